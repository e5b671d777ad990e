"A server for tests: in processes of its own, or in a thread of this one."
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from werkzeug.serving import WSGIRequestHandler, make_server

import fastrecipes
from fastrecipes.production.predictor import Predictor
from fastrecipes.production.server import create_app

ENV = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(fastrecipes.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))


@contextmanager
def served(bundle, *options, command=('-m', 'fastrecipes', 'serve'), env=ENV):
    "`fastrecipes serve BUNDLE options` on a free port: the process, with its `.port`, `.url` and what it `.said`; ended with the block."
    process = subprocess.Popen([sys.executable, *command, str(bundle), '--port', '0', *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=Path(bundle))
    process.said = []
    def listen():
        for line in process.stdout: process.said.append(line)
    listener = Thread(target=listen, daemon=True)
    listener.start()
    try:
        until = time.monotonic() + 60
        while not (found := re.search(r'serving (http://.*:(\d+))', ''.join(process.said))):
            assert process.poll() is None and time.monotonic() < until, process.said
            time.sleep(.02)
        process.url, process.port = f'http://localhost:{found[2]}', int(found[2])
        yield process
    finally:
        if process.poll() is None: process.send_signal(signal.SIGTERM)
        try: process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally: listener.join(5)


class Quiet(WSGIRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log(self, *args): pass


@contextmanager
def in_process(bundle):
    "The application of a bundle behind a port, in a thread: its URL."
    server = make_server('127.0.0.1', 0, create_app(Predictor(bundle, threads=1)), threaded=True, request_handler=Quiet)
    Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown()
