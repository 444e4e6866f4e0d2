"""A server on 127.0.0.1 that speaks OpenAI's protocol, and can fail on demand."""
import http.server
import json
import threading

TOKENS_IN, TOKENS_OUT = 20, 60  # of every answer
MESSAGES = {  # as OpenAI words them
    401: 'Incorrect API key provided: wrong',
    404: 'The model `wise` does not exist or you do not have access to it.',
    429: 'Rate limit reached for wise in organization org-x on requests per min (RPM): Limit 3',
    'no credit': 'You exceeded your current quota, please check your plan and billing details.',
    'wants the other name': "Unsupported parameter: 'max_tokens' is not supported with this model. "
                            "Use 'max_completion_tokens' instead."}
STATUS = {'no credit': 429, 'wants the other name': 400, 'wait': 503}


class Endpoint:
    """A server that speaks OpenAI's protocol.

    url: its address.
    trouble: what happens to the next requests, one each: an HTTP status, or a word that Handler
    knows.
    always: what happens to the others; 'ok': they are answered.
    say(prompt): the answer.
    hold_after: how many requests are let through before the others wait for `go`.
    asked: the requests so far, [(prompt, name of the limit)].
    """

    def __init__(self):
        self.trouble = []
        self.always = 'ok'
        self.say = str.upper
        self.hold_after = 10**9
        self.asked = []
        self.lock = threading.Lock()
        self.go = threading.Event()
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler_of(self))
        self.server.handle_error = lambda *args: None  # a client was killed
        self.url = f'http://127.0.0.1:{self.server.server_port}/v1'
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def prompts(self):
        return [prompt for prompt, _ in self.asked]

    def wait_for(self, n_asked):
        while len(self.asked) < n_asked:
            self.go.wait(0.01)


def handler_of(endpoint):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            [message] = request['messages']
            prompt = message['content']
            limit_name = 'max_tokens' if 'max_tokens' in request else 'max_completion_tokens'
            with endpoint.lock:
                text = endpoint.say(prompt)
                how = endpoint.trouble.pop(0) if endpoint.trouble else endpoint.always
                endpoint.asked.append((prompt, limit_name))
                hold = len(endpoint.asked) > endpoint.hold_after
            if hold or how == 'hangs':
                endpoint.go.wait()
            if self.headers['Authorization'] not in ('Bearer right', 'Bearer none'):
                how = 401
            if how == 'wants the other name' and limit_name == 'max_completion_tokens':
                how = 'ok'
            if how == 'dropped':
                return
            self.send(how, text)

        def send(self, how, text):
            choice = {'index': 0, 'finish_reason': 'stop',
                      'message': {'role': 'assistant', 'content': text}}
            if how == 'too long':
                choice['finish_reason'] = 'length'
            if how == 'empty':
                choice['message']['content'] = ''
            if how == 'filtered':
                choice |= {'finish_reason': 'content_filter', 'message': None}
            content = {'choices': [choice],
                       'usage': {'prompt_tokens': TOKENS_IN, 'completion_tokens': TOKENS_OUT}}
            if how == 'null counts':
                content['usage'] = {'prompt_tokens': None, 'completion_tokens': None}
            status = how if isinstance(how, int) else STATUS.get(how, 200)
            if status != 200:
                content = {'error': {'message': MESSAGES.get(how, 'a fault'), 'code': str(how)}}
            if how == 'no choices':
                content = {'error': 'overloaded'}
            body = json.dumps(content).encode()
            if how == 'broken':
                body = body[:-7]
            if how == 'a page':
                body = b'<html>Please log in</html>'
            self.send_response(status)
            self.send_header('Content-Type', 'text/html' if how == 'a page' else 'application/json')
            self.send_header('Content-Length', str(len(body)))
            # A second, or a thousandth of it, which the package openai knows as well
            self.send_header('Retry-After' if how == 'wait' else 'retry-after-ms', '1')
            self.end_headers()
            self.wfile.write(body[:20] if how == 'cut' else body)

        def log_message(self, *args):
            pass
    return Handler
