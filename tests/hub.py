"""A Hugging Face hub on 127.0.0.1 that serves a folder, owner/name/file, and fails on demand."""
import hashlib
import http.server
import json
import threading
import urllib.parse


class Hub:
    """url; files: {'owner/name': {path: bytes}}; `trouble`: what befalls the next requests for content, 'ok', 'cut',
    'wrong' (bytes) or a status; seen: [(path, range, what befell it)] of the requests for content."""

    def __init__(self, files):
        self.files, self.trouble, self.seen = files, [], []
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), self.handler())
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self, folder):
        """Variables that make huggingface_hub and datasets use this hub, and caches of their own."""
        return {'HF_ENDPOINT': self.url, 'HF_HOME': str(folder), 'NO_PROXY': '127.0.0.1'}

    def entry(self, repository, path):
        content = self.files[repository][path]
        return {'type': 'file', 'oid': 'a' * 40, 'path': path, 'size': len(content), 'rfilename': path,
                'lfs': {'oid': hashlib.sha256(content).hexdigest(), 'sha256': hashlib.sha256(content).hexdigest(),
                        'size': len(content), 'pointerSize': 100}}

    def listing(self, repository, folder, recursive):
        paths = [p for p in self.files[repository] if p.startswith(folder)]
        entries = [self.entry(repository, p) for p in paths if recursive or '/' not in p[len(folder):]]
        folders = {folder + p[len(folder):].partition('/')[0] for p in paths if '/' in p[len(folder):]}
        return entries + [{'type': 'directory', 'oid': 'b' * 40, 'path': p} for p in sorted(folders) if not recursive]

    def handler(hub):
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
                self.close_connection = self.close_connection or cut

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
                path = urllib.parse.unquote(urllib.parse.unquote(urllib.parse.urlparse(self.path).path)).strip('/')
                parts = path.removeprefix('api/').split('/')
                repository = '/'.join(parts[1:3] if parts[0] in ('datasets', 'models') else parts[:2])
                if repository not in hub.files:
                    self.answer(b'{}', 404, X_Error_Code='RepoNotFound')
                elif path.startswith('api/'):
                    self.answer(json.dumps(self.api(repository, parts[3:], body)).encode(),
                                Content_Type='application/json')
                else:
                    self.content(repository, path.partition('/resolve/')[2])

            def api(self, repository, parts, body):
                if parts and parts[0] == 'tree':
                    folder = '/'.join(self.without_revision(parts[1:]))
                    return hub.listing(repository, folder + '/' * bool(folder), 'recursive=true' in self.path.lower())
                if parts and parts[0] == 'paths-info':
                    paths = (json.loads(body) if body[:1] == b'{' else urllib.parse.parse_qs(body.decode()))['paths']
                    return [hub.entry(repository, p) for p in paths if p in hub.files[repository]]
                return {'id': repository, 'sha': 'c' * 40, 'private': False, 'tags': [], 'downloads': 0,
                        'siblings': [hub.entry(repository, p) for p in hub.files[repository]]}

            def without_revision(self, parts):
                return parts[3:] if parts[:2] == ['refs', 'convert'] else parts[1:]

            def content(self, repository, rest):
                path = '/'.join(self.without_revision(rest.split('/')))
                if path not in hub.files[repository]:
                    return self.answer(b'', 404, X_Error_Code='EntryNotFound')
                how = hub.trouble.pop(0) if hub.trouble and self.command == 'GET' else 'ok'
                hub.seen.append((path, self.headers.get('Range'), how))
                if isinstance(how, int):
                    return self.answer(b'', how)
                content = hub.files[repository][path]
                headers = {'ETag': f'"{hashlib.sha256(content).hexdigest()}"', 'X_Repo_Commit': 'c' * 40,
                           'Accept_Ranges': 'bytes'}
                content = bytes(len(content)) if how == 'wrong' else content
                if not self.headers.get('Range'):
                    return self.answer(content, cut=how == 'cut', **headers)
                first, _, last = self.headers['Range'].removeprefix('bytes=').partition('-')
                first, last = int(first), min(int(last or len(content)), len(content) - 1)
                self.answer(content[first:last + 1], 206, how == 'cut',
                            Content_Range=f'bytes {first}-{last}/{len(content)}', **headers)

            do_POST = do_HEAD = do_GET

            def log_message(self, *args):
                pass
        return Handler
