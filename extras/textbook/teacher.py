"""
Ask a teacher, a model behind any endpoint of OpenAI's protocol, and keep its answers.
    OPENAI_API_KEY=… python extras/textbook/prepare.py --source=api --teacher=gpt-4o-mini

The endpoint is OPENAI_BASE_URL or, without one, OpenAI's own. The package openai asks, waits and
tries again. Each answer is a line of folder/answers.jsonl, and a prompt that has one is not asked
again: whatever ends a run, the same command continues. A kill loses only the answers that are under
way, though they may have to be paid for; Ctrl-C waits for them.

Needs the package openai, and folio/.
"""
import concurrent.futures
import json
import os
import re
import signal
import sys
import threading

from tqdm import tqdm

from folio.configurator import UserError, notice
from folio.log import only_one, read

try:
    import openai
except ImportError:
    raise UserError('a teacher is asked with a package: pip install openai') from None

TIMEOUT = 300  # seconds to wait for an answer
ADVICE = {  # on an error that has outlasted all tries, by the first class that fits
    openai.APITimeoutError: 'it may need a smaller --max_tokens or --concurrency',
    openai.APIConnectionError: 'is it running? Check OPENAI_BASE_URL and the network',
    openai.AuthenticationError: 'check OPENAI_API_KEY',
    openai.PermissionDeniedError: 'check OPENAI_API_KEY',
    openai.NotFoundError: 'check --teacher and OPENAI_BASE_URL',
    openai.RateLimitError: 'wait, lower --concurrency, or add credit'}


class Teacher:
    """One model, its answers, and what they have cost."""

    def __init__(self, model, folder, budget, price_in, price_out, max_tokens=1024, concurrency=8):
        """Read the answers of earlier runs. Raises UserError if another run uses the folder.

        budget: US dollars for this model, earlier runs included. Only the answers that are under
        way when it is spent can exceed it. price_in, price_out: dollars for a million
        tokens. max_tokens: of an answer. concurrency: prompts asked at once.
        """
        key = os.environ.get('OPENAI_API_KEY')
        if not key and not os.environ.get('OPENAI_BASE_URL'):
            raise UserError('set OPENAI_API_KEY to your key, '
                            'or OPENAI_BASE_URL to an endpoint that needs none')
        # At first a mistake is likelier than a passing fault: retry for some seconds only
        self.client = openai.OpenAI(api_key=key or 'none', timeout=TIMEOUT, max_retries=3)
        self.model = model
        self.budget = budget
        self.price_in = price_in
        self.price_out = price_out
        self.max_tokens = max_tokens
        self.limit_name = 'max_tokens'  # as this endpoint calls it
        self.concurrency = concurrency

        self.changing = threading.Lock()
        self.answers = {}  # {prompt: text}
        self.cut = {}  # {prompt: the max_tokens that its answer did not fit in}
        self.spent = 0.0
        self.is_stopping = False  # threads ask nothing more
        self.last_reason = ''  # why a prompt got no answer

        os.makedirs(folder, exist_ok=True)
        self.in_use = only_one(os.path.join(folder, 'answers.lock'))
        self.file = open(os.path.join(folder, 'answers.jsonl'), 'a+b')
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b'\n') + 1)  # a kill may have torn the last line
        for entry in read(self.file.name):
            self.count(entry)

    def close(self):
        self.file.close()
        self.in_use.release()

    def count(self, entry):
        """Add an answer and its cost, if it is this model's."""
        if entry['model'] != self.model:
            return
        cost = entry['tokens_in'] * self.price_in + entry['tokens_out'] * self.price_out
        self.spent += cost / 1e6
        text = without_thoughts(entry['text'])
        if entry['is_cut']:
            self.cut[entry['prompt']] = entry['max_tokens']  # half a page is worse than none
        elif text:
            self.answers[entry['prompt']] = text

    def ask(self, prompts, what):
        """Return {prompt: answer} for all prompts that get one; say how many do not.

        what: the name of the progress bar. Raises UserError when the budget is spent, or when the
        endpoint does not answer.
        """
        prompts = list(dict.fromkeys(prompts))  # each one once
        new = []
        for prompt in prompts:
            if prompt not in self.answers and self.cut.get(prompt, 0) < self.max_tokens:
                new.append(prompt)
        bar = tqdm(desc=what, total=len(prompts), initial=len(prompts) - len(new),
                   disable=not prompts)
        self.is_stopping = False
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool, bar:
            futures = [pool.submit(self.ask_one, prompt) for prompt in new]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    bar.set_postfix_str(f'${self.spent:.4f}', refresh=False)
                    bar.update()
            except KeyboardInterrupt:
                print('\nwaiting for the answers that are under way; Ctrl-C again ends at once',
                      file=sys.stderr)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                raise
            finally:
                self.is_stopping = True
        self.report_missing(prompts)
        return {prompt: self.answers[prompt] for prompt in prompts if prompt in self.answers}

    def ask_one(self, prompt):
        """Ask for one answer and keep it. Raises UserError for what ends the run."""
        if self.is_stopping:
            return
        if self.spent >= self.budget:
            self.end(f'the budget of ${self.budget:g} is spent (${self.spent:.4f}); with a larger '
                     '--budget the same command continues, with fewer --pages and --exercises it '
                     'uses what is there')
        try:
            completion = self.request(prompt)
        except openai.BadRequestError as e:
            if not self.answers:
                self.end(self.explain(e))
            # Others are answered, so it is this prompt: too long, or against a rule
            self.last_reason = str(e)
            return
        except (openai.OpenAIError, ValueError) as e:
            self.end(self.explain(e))
        choice = completion.choices[0]
        text = getattr(choice.message, 'content', None)
        # Without counts assume the most: a token is hardly ever shorter than a character
        tokens_in = getattr(completion.usage, 'prompt_tokens', None)
        tokens_out = getattr(completion.usage, 'completion_tokens', None)
        self.keep({
            'model': self.model,
            'prompt': prompt,
            'text': text if isinstance(text, str) else '',  # no text: a filter has stopped it
            'is_cut': choice.finish_reason == 'length',
            'max_tokens': self.max_tokens,
            'tokens_in': len(prompt) if tokens_in is None else tokens_in,
            'tokens_out': self.max_tokens if tokens_out is None else tokens_out})

    def request(self, prompt):
        """Return the completion of a prompt, after up to max_retries more tries.

        Raises openai.OpenAIError, and ValueError for what isn't a completion, such as a web page.
        """
        limit_name = self.limit_name
        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=[{'role': 'user', 'content': prompt}],
                **{limit_name: self.max_tokens})
        except openai.BadRequestError as e:
            # OpenAI's reasoning models want the new name; some servers know only the old one
            if limit_name == 'max_tokens' and 'max_completion_tokens' in str(e):
                self.limit_name = 'max_completion_tokens'
                return self.request(prompt)
            raise
        if not getattr(completion, 'choices', None):
            raise ValueError(f'this is not a completion: {completion}')
        return completion

    def keep(self, entry):
        """Write an answer to the file, and count it."""
        with self.changing:
            self.count(entry)  # first: what cannot be counted must not stay in the file
            self.file.write(json.dumps(entry).encode() + b'\n')
            self.file.flush()
        if entry['prompt'] not in self.answers:
            self.last_reason = 'an empty answer'
        self.client.max_retries = 10  # it works, so from now on retry for a minute

    def end(self, reason):
        """Stop all threads from asking more, and raise UserError."""
        self.is_stopping = True
        raise UserError(reason)

    def explain(self, error):
        """Return an error in one line, with the remedy."""
        reason = error.__cause__ or error  # openai itself says only "Connection error."
        address = self.client.base_url.netloc.decode()  # without a password
        line = f'{self.model} at {address}: {" ".join(str(reason).split())[:300]}'
        for kind, advice in ADVICE.items():
            if isinstance(error, kind):
                line += f'; {advice}'
                break
        return f'{line}; what was answered is kept'

    def report_missing(self, prompts):
        """Say how many prompts have no answer, and why."""
        missing = [prompt for prompt in prompts if prompt not in self.answers]
        n_cut = sum(prompt in self.cut for prompt in missing)
        if n_cut:
            notice(f'{n_cut} of {len(prompts)} answers did not fit in {self.max_tokens:,} tokens '
                   'and are left out; a larger --max_tokens asks for them again')
        if len(missing) > n_cut:
            notice(f'{len(missing) - n_cut} of {len(prompts)} prompts got no answer (the last: '
                   f'{self.last_reason}); the same command asks for them again')


def without_thoughts(answer):
    """Return an answer without what a reasoning model thinks first, which some servers let through.

    Of the two marks around it the first may be missing, because it belongs to the model's prompt.

    >>> without_thoughts('<think>A list.</think> [1]')
    '[1]'
    """
    return re.sub(r'.*</think>|<think>.*', '', answer, flags=re.DOTALL).strip()
