"""A server that speaks the chat protocol, for tests: ``python chat_server.py KEY``; it prints its port.

It checks the shape of every request (422 says what is wrong), and then does what a word of the caption asks for: see
`ChatHandler.MOODS`; any other caption gets a good dialogue. GET /asked returns the number of requests per caption.
"""

import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = sys.argv[1]
MODEL = "small-model"
ASKED = {"caption", "prompt_seed", "caption_seed", "answer_seed"}
asked: Counter[str] = Counter()
lock = threading.Lock()


def check(body: dict) -> str:
    """The caption of a request; an AssertionError says what is wrong with its shape."""
    assert body.keys() == {"model", "messages", "seed"}, f"keys {sorted(body)}"
    assert body["model"] == MODEL, f"model {body['model']}"
    assert isinstance(body["seed"], int) and body["seed"] >= 0, f"seed {body['seed']}"
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", *["user", "assistant"] * 4, "user"], f"roles {roles}"
    system, *shots, task = (message["content"] for message in body["messages"])
    assert "Constraints:" in system and "JSON" in system, "no constraints"
    assert all(json.loads(shot).keys() == ASKED for shot in shots[::2]), "examples asked"
    assert all(json.loads(shot).keys() == {"prompt", "answer"} for shot in shots[1::2]), "examples written"
    assert len(set(shots[::2])) == 4, "repeated examples"
    assert json.loads(task).keys() == ASKED, "task"
    return json.loads(task)["caption"]


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, json.dumps(asked))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Authorization"]
        if self.path != "/v1/chat/completions":
            return self.reply(404, '{"error": {"message": "no such page"}}')
        if key != f"Bearer {KEY}":
            return self.reply(401, json.dumps({"error": {"message": f"{key} is no key"}}))
        try:
            caption = check(body)
        except AssertionError as error:
            return self.reply(422, json.dumps({"error": {"message": str(error)}}))
        with lock:
            asked[caption] += 1
        for word, mood in self.MOODS.items():
            if word in caption.split():
                return mood(self, caption, body["seed"])
        self.good(caption, body["seed"])

    def good(self, caption, seed):
        written = {
            "prompt": f"Please show me {caption}, version {seed}.",
            "answer": f"Here is the picture of {caption}.",
        }
        self.say(json.dumps(written))

    def fenced(self, caption, seed):
        written = {"prompt": f"Please show me {caption}\n again.", "answer": f"Here is {caption}."}
        self.say(f"<think>{{ hm }}</think>Sure:\n```json\n{json.dumps(written, indent=1)}\n```")

    def busy(self, caption, seed):
        if asked[caption] < 3:
            return self.reply(429, '{"error": {"message": "slow down"}}', ("retry-after-ms", "10"))
        self.good(caption, seed)

    def hang_once(self, caption, seed):
        if asked[caption] == 1:
            time.sleep(3600)
        self.good(caption, seed)

    def leak(self, caption, seed):
        self.reply(400, json.dumps({"error": {"message": f"bad request, {self.headers['Authorization']}"}}))

    def hang_up(self, caption, seed):
        self.close_connection = True
        self.connection.close()

    MOODS = {
        "fenced": fenced,
        "busy": busy,
        "slow": hang_once,
        "hanging": lambda self, *_: time.sleep(3600),
        "crowded": lambda self, *_: self.reply(429, "{}", ("retry-after-ms", "10")),
        "broken": lambda self, *_: self.reply(500, "{}", ("retry-after-ms", "10")),
        "garbled": lambda self, *_: self.reply(200, '{"choices": [{"mess'),
        "hollow": lambda self, *_: self.reply(200, '{"choices": []}'),
        "silent": lambda self, *_: self.say(""),
        "malformed": lambda self, *_: self.say('{"prompt": "Please show'),
        "halved": lambda self, caption, _: self.say(json.dumps({"prompt": caption})),
        "refused": lambda self, *_: self.say("I’m sorry, but I can’t help with that."),
        "forgotten": lambda self, *_: self.say('{"prompt": "Please draw a cat.", "answer": "Here is the cat."}'),
        "leaking": leak,
        "cut": hang_up,
    }

    def say(self, content):
        message = {"role": "assistant", "content": content}
        self.reply(200, json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}))

    def reply(self, status, text, *headers):
        data = text.encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler)
    print(server.server_port, flush=True)
    server.serve_forever()
