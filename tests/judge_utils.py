"""A server with OpenAI's chat completions whose answers a test writes."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = dict | str | int  # a body, the text of an answer, or a status

HANG_UP = -1  # a status: the connection is closed without an answer


def completion(text: str | None, finish_reason: str = "stop") -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


class FakeJudge:
    """`reply(question, headers) -> Reply`; `asked` are the bodies of all requests, in order of arrival."""

    def __init__(self, reply: Callable[[str, dict], Reply]):
        self.reply, self.asked = reply, []
        self.together = self.most_together = 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


@contextlib.contextmanager
def serving(reply: Callable[[str, dict], Reply]) -> Iterator[FakeJudge]:
    judge = FakeJudge(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.asked.append(body)
                judge.together += 1
                judge.most_together = max(judge.most_together, judge.together)
            reply = judge.reply(body["messages"][-1]["content"], dict(self.headers))
            with judge.lock:
                judge.together -= 1
            if reply == HANG_UP:
                self.close_connection = True
                return
            status = reply if isinstance(reply, int) else 200
            content = completion(reply) if isinstance(reply, str) else reply
            content = {"error": {"message": f"status {status}"}} if status != 200 else content
            payload = content["raw"].encode() if "raw" in content else json.dumps(content).encode()
            with contextlib.suppress(OSError):  # a client that has given up
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
