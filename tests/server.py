"""A server on 127.0.0.1 that has one file, and fails on demand."""
import gzip
import http.server
import threading


class FileServer:
    """A server at `url`, until server.server.shutdown(), that answers any path with its content.

    script: what happens to the next requests: 'ok', 'cut' (500 bytes of it come), 'wrong' (other
    bytes), 'gzip' or a status. When the list is used up, all is well.
    asked: the paths of the requests.
    """

    def __init__(self, content):
        self.content = content
        self.script = []
        self.asked = []
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler_of(self))
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def handler_of(server):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            how = server.script.pop(0) if server.script else 'ok'
            if isinstance(how, int):
                self.send_error(how)
                return
            body = server.content
            self.send_response(200)
            if how == 'wrong':
                body = body.swapcase()
            if how == 'gzip':
                body = gzip.compress(body)
                self.send_header('Content-Encoding', 'gzip')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[:500] if how == 'cut' else body)

        def log_message(self, *args):
            pass
    return Handler
