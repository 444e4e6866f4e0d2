"""A Hugging Face hub on 127.0.0.1 that serves files from memory, and fails on demand."""
import hashlib
import http.server
import json
import threading
import urllib.parse

# The hub names versions by hashes; the tests need only that they are there.
COMMIT = 'c' * 40
FILE_ID = 'a' * 40
FOLDER_ID = 'b' * 40


class Hub:
    """A server at `url`, until server.shutdown().

    files: {'owner/name': {path: bytes}}.
    trouble: what happens to the next requests for content: 'ok', 'cut' (half of it comes), 'wrong'
    (other bytes) or a status. When the list is used up, all is well.
    seen: [(path, range, what happened)] of the requests for content.
    """

    def __init__(self, files):
        self.files = files
        self.trouble = []
        self.seen = []
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), self.handler())
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self, folder):
        """Return variables that make huggingface_hub and datasets use this hub, and a new cache."""
        return {'HF_ENDPOINT': self.url, 'HF_HOME': str(folder), 'NO_PROXY': '127.0.0.1'}

    def entry(self, repository, path):
        """Return what the hub says of a file."""
        content = self.files[repository][path]
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {'oid': sha256, 'sha256': sha256, 'size': len(content), 'pointerSize': 100}
        return {'type': 'file', 'oid': FILE_ID, 'path': path, 'rfilename': path,
                'size': len(content), 'lfs': lfs}

    def listing(self, repository, folder, recursive):
        """Return what the hub says of a folder: '' or one that ends with a slash."""
        entries = []
        folders = set()
        for path in self.files[repository]:
            if not path.startswith(folder):
                continue
            first, slash, _ = path.removeprefix(folder).partition('/')
            if recursive or not slash:
                entries.append(self.entry(repository, path))
            else:
                folders.add(folder + first)
        for path in sorted(folders):
            entries.append({'type': 'directory', 'oid': FOLDER_ID, 'path': path})
        return entries

    def handler(hub):
        """Return the class that answers requests; in it `hub` is this object, `self` a request."""
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def answer(self, body, status=200, cut=False, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace('_', '-'), value)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                if self.command != 'HEAD':
                    self.wfile.write(body[:len(body) // 2] if cut else body)
                if cut:
                    self.close_connection = True

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
                path = urllib.parse.urlparse(self.path).path
                path = urllib.parse.unquote(urllib.parse.unquote(path)).strip('/')  # quoted twice
                parts = path.removeprefix('api/').split('/')
                if parts[0] in ('datasets', 'models'):
                    repository = '/'.join(parts[1:3])
                else:
                    repository = '/'.join(parts[:2])
                if repository not in hub.files:
                    self.answer(b'{}', 404, X_Error_Code='RepoNotFound')
                elif path.startswith('api/'):
                    facts = self.api(repository, parts[3:], body)
                    self.answer(json.dumps(facts).encode(), Content_Type='application/json')
                else:
                    self.content(repository, path.partition('/resolve/')[2])

            do_POST = do_GET
            do_HEAD = do_GET

            def api(self, repository, parts, body):
                """Return the answer to a question about a repository."""
                files = hub.files[repository]
                if parts and parts[0] == 'tree':
                    folder = '/'.join(self.without_revision(parts[1:]))
                    if folder:
                        folder += '/'
                    return hub.listing(repository, folder, 'recursive=true' in self.path.lower())
                if parts and parts[0] == 'paths-info':
                    is_json = body.startswith(b'{')  # else a form
                    question = json.loads(body) if is_json else urllib.parse.parse_qs(body.decode())
                    return [hub.entry(repository, path) for path in question['paths']
                            if path in files]
                return {'id': repository, 'sha': COMMIT, 'private': False, 'tags': [],
                        'downloads': 0, 'siblings': [hub.entry(repository, path) for path in files]}

            def without_revision(self, parts):
                """Return the parts of a path after 'main', a commit or 'refs/convert/parquet'."""
                if parts[:2] == ['refs', 'convert']:
                    return parts[3:]
                return parts[1:]

            def content(self, repository, rest):
                """Send a file, or the range of it that was asked for, or what `trouble` says."""
                path = '/'.join(self.without_revision(rest.split('/')))
                if path not in hub.files[repository]:
                    return self.answer(b'', 404, X_Error_Code='EntryNotFound')
                how = 'ok'
                if hub.trouble and self.command == 'GET':
                    how = hub.trouble.pop(0)
                asked = self.headers.get('Range')
                hub.seen.append((path, asked, how))
                if isinstance(how, int):
                    return self.answer(b'', how)

                content = hub.files[repository][path]
                headers = {'ETag': f'"{hashlib.sha256(content).hexdigest()}"',
                           'X_Repo_Commit': COMMIT, 'Accept_Ranges': 'bytes'}
                if how == 'wrong':
                    content = bytes(len(content))
                if not asked:
                    return self.answer(content, cut=how == 'cut', **headers)
                first, _, last = asked.removeprefix('bytes=').partition('-')
                first = int(first)
                last = min(int(last or len(content)), len(content) - 1)
                headers['Content_Range'] = f'bytes {first}-{last}/{len(content)}'
                self.answer(content[first:last + 1], 206, cut=how == 'cut', **headers)

            def log_message(self, *args):
                pass
        return Handler
