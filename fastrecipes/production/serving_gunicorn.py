"gunicorn for a model: loaded after the fork, no file, no log of what clients send, and nobody may take longer than the time allowed to send a request."
import os
import socket
import sys
import time
from collections.abc import Callable

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from fastrecipes.errors import UserError

__all__ = ['Server']

# no log of requests, no socket in the home folder
QUIET = dict(loglevel='error', accesslog=None, control_socket_disable=True, proc_name='fastrecipes-serve', keepalive=75, worker_connections=1000)


class Server(BaseApplication):
    "`load()` makes the application, once in each worker; a request must have arrived within `timeout` seconds; `config`: gunicorn's settings."
    def __init__(self, load: Callable, timeout: float, config: dict):
        self.make, self.config = load, config
        Patient.allowed = timeout
        super().__init__()

    def load_config(self):
        memory = dict(worker_tmp_dir='/dev/shm') if os.access('/dev/shm', os.W_OK) else {}       # the heartbeat: a disk may block it
        for name, value in {**QUIET, **memory, **self.config, 'worker_class': Patient}.items():
            if name in self.cfg.settings: self.cfg.set(name, value)     # control_socket_disable: from version 25 on

    def load(self):
        try: return self.make()
        except UserError as e:
            print(f'fastrecipes: {e}', file=sys.stderr)
            sys.exit(Arbiter.APP_LOAD_ERROR)    # the arbiter ends, instead of trying again


class Patient(ThreadWorker):
    """A worker of threads that slow clients do not hold for ever: gunicorn itself waits without limit for the rest of a request.

    After the time allowed the socket is closed for reading: what reads from it finds the end, and can still answer."""
    allowed = 30.

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reading = {}

    def run(self):
        try: super().run()
        finally: self.wsgi.extensions['fastrecipes']['predictor'].run.session = None     # left to the end of the process, onnxruntime's threads abort it

    def handle(self, conn):
        self.reading[conn] = time.monotonic() + self.allowed
        try: return super().handle(conn)
        finally: self.reading.pop(conn, None)

    def notify(self):
        "At least once a second, also while the worker drains."
        super().notify()
        now = time.monotonic()
        for conn, until in list(self.reading.items()):
            if now > until:
                self.reading.pop(conn, None)
                try: conn.sock.shutdown(socket.SHUT_RD)
                except OSError: pass

    def handle_exit(self, sig, frame):
        "SIGTERM: from now on /readyz says no."
        if self.booted: self.wsgi.extensions['fastrecipes']['ending'].set()
        super().handle_exit(sig, frame)
