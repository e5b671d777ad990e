"A bundle behind a port: gunicorn's processes on Unix, waitress' threads on Windows. What `fastrecipes serve` and `python serve.pyz` run."
import argparse
import ctypes
import logging
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from signal import SIGTERM, raise_signal, signal
from threading import Thread

from fastrecipes.errors import BadValue, NotThere, UserError
from fastrecipes.production.predictor import Predictor, opened
from fastrecipes.production.server import MAX_MB, create_app
from fastrecipes.production.serving_metrics import FLYING, Metrics

__all__ = ['run_server', 'cores', 'main']

PORT, HOST, THREADS, TIMEOUT = 5000, '127.0.0.1', 64, 30
SLOTS = 8                               # of the counters, more than workers: one that is replaced may live a little longer than its successor


def run_server(bundle, *, port: int = PORT, host: str = HOST, workers: int | None = None, threads: int = THREADS, max_mb: float = MAX_MB, timeout: int = TIMEOUT,
               waitress: bool = False) -> int:
    """Serve a bundle until SIGTERM or Ctrl-C, which let requests under way finish.

    `port`: 0 for any that is free; `workers`: processes, each with a model of its own (default: one a core; cores are divided among them); `threads`:
    requests that a process reads and answers at once, at least 2, three in four of them predictions, the rest to tell others to come back; `max_mb`: the
    largest upload, MB; `timeout`: seconds that a request may take to arrive; `waitress`: that server in place of gunicorn: one process, all cores. Raises
    `ValueError` and `FileNotFoundError` before anything is served: no or a changed bundle, a port in use, a server that is not installed."""
    for name, value, least in (('port', port, 0), ('workers', workers, 1), ('threads', threads, 2), ('max_mb', max_mb, .001), ('timeout', timeout, 1)):
        if value is not None and not value >= least: raise BadValue(f'{name}: at least {least:g}, got {value:g}')
    if port > 65535: raise BadValue(f'port: at most 65535, got {port}')
    waitress = waitress or os.name == 'nt'
    if waitress and workers not in (None, 1): raise BadValue(f'workers: waitress is one process, got {workers}; leave it out, or serve by gunicorn')
    opened(bundle)                      # its files are as they were shipped; the model itself is loaded by each worker, after the fork
    _check_port(host, port)
    _few_arenas()
    workers = 1 if waitress else workers or cores()
    settings = dict(max_mb=max_mb, queue=max(1, 3*threads//4), decoders=max(1, cores()//workers)+1)
    return _waitress(bundle, host, port, threads, timeout, settings) if waitress else _gunicorn(bundle, host, port, workers, threads, timeout, settings)


def cores() -> int:
    "The cores that this process may use: those it is bound to, at most what its container is granted."
    bound = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try: quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
    except (OSError, ValueError): return bound
    return bound if quota == 'max' else max(1, min(bound, round(int(quota)/int(period))))


def _check_port(host: str, port: int):
    "Raise where nothing can listen: gunicorn would try again for five seconds, and say it in its own words."
    try: family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError): raise BadValue(f'host: {host!r} is not an address of this machine') from None
    with socket.socket(family, socket.SOCK_STREAM) as s:
        if os.name != 'nt': s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try: s.bind(address)
        except PermissionError: raise BadValue(f'port: {port} needs an administrator; 1024 and above do not') from None
        except OSError as e: raise BadValue(f'port: {port} on {host} cannot be had ({(e.strerror or str(e)).lower()}); give another --port') from None


def _few_arenas():
    "Let glibc keep two heaps instead of eight a core: each thread that decodes images leaves holes in its own, and memory grows for hours."
    try: ctypes.CDLL(None).mallopt(-8, 2)           # M_ARENA_MAX
    except (OSError, AttributeError, TypeError): pass       # another allocator than glibc's


def _application(bundle, threads: int, metrics: Metrics, settings: dict):
    "What a worker loads after its fork."
    warnings.simplefilter('ignore')                                     # what Pillow says of what strangers upload
    logging.getLogger('PIL').addHandler(logging.NullHandler())
    return create_app(Predictor(bundle, threads=threads), metrics=metrics, **settings)


def _say(address, workers: int, each: int):
    host, port = (f'[{address[0]}]' if ':' in address[0] else address[0]), address[1]
    where = f'{workers} {"process" if workers == 1 else "processes"} on {each} {"core" if each == 1 else "cores"}{" each" if workers > 1 else ""}'
    print(f'serving http://{host}:{port} ({where}); Ctrl-C ends it', flush=True)


def _gunicorn(bundle, host, port, workers, threads, timeout, settings) -> int:
    try: from fastrecipes.production.serving_gunicorn import Server
    except ImportError as e: raise NotThere(f'serve: {e.name} is not installed; pip install gunicorn, or add --waitress') from None
    metrics, each = Metrics(workers+SLOTS), max(1, cores()//workers)
    config = dict(bind=f'[{host}]:{port}' if ':' in host else f'{host}:{port}', workers=workers, threads=threads, timeout=max(60, 2*timeout), graceful_timeout=timeout+5,
                  when_ready=lambda arbiter: _say(arbiter.LISTENERS[0].sock.getsockname(), workers, each),
                  pre_fork=lambda arbiter, worker: metrics.give_slot(worker), child_exit=lambda arbiter, worker: metrics.take_back(worker))
    Server(lambda: _application(bundle, each, metrics, settings), timeout, config).run()
    return 0


def _waitress(bundle, host, port, threads, timeout, settings) -> int:
    try: from waitress import create_server
    except ImportError: raise NotThere('serve: waitress is not installed; pip install waitress') from None
    app = _application(bundle, cores(), Metrics(), settings)
    largest = int(settings['max_mb']*1e6) + 100_000
    server = create_server(app, host=host, port=port, threads=threads, channel_timeout=timeout, cleanup_interval=max(1, timeout//4), ident=None, clear_untrusted_proxy_headers=True,
                           inbuf_overflow=2*largest, max_request_body_size=4*largest)        # it would write what is larger than inbuf_overflow to disk
    mine = app.extensions['fastrecipes']

    def ends(*_):
        if mine['ending'].is_set(): raise KeyboardInterrupt
        mine['ending'].set()
        Thread(target=_drain, args=(mine['metrics'], timeout), daemon=True).start()
    if os.name != 'nt': signal(SIGTERM, ends)
    _say(server.effective_listen[0] if hasattr(server, 'effective_listen') else (server.effective_host, server.effective_port), 1, cores())
    server.run()
    server.close()
    return 0


def _drain(metrics: Metrics, timeout: int):
    "Let waitress answer what is under way, then end it."
    until = time.monotonic() + timeout
    quiet = 0
    while quiet < 5 and time.monotonic() < until:
        time.sleep(.1)
        quiet = quiet+1 if metrics.total(FLYING) == 0 else 0
    raise_signal(SIGTERM)


def main(argv=None) -> int:
    "What `python serve.pyz` does: serve the bundle that it lies in."
    parser = argparse.ArgumentParser(prog='serve.pyz', description='Serve the bundle in this folder: POST an image to /predict.')
    parser.add_argument('bundle', nargs='?', default=Path(sys.argv[0]).resolve().parent, help='another folder that `fastrecipes ship` wrote')
    for name, kind, default, said in (('port', int, PORT, '0 for any that is free'), ('host', str, HOST, '0.0.0.0 for all of this machine'),
                                      ('workers', int, None, 'processes (one a core)'), ('threads', int, THREADS, 'requests that a process answers at once'),
                                      ('max-mb', float, MAX_MB, 'the largest upload, MB'), ('timeout', int, TIMEOUT, 'seconds a request may take to arrive')):
        spelled = dict.fromkeys([f'--{name}', f'--{name.replace("-", "_")}'])         # as `fastrecipes serve` has it
        parser.add_argument(*spelled, type=kind, default=default, help=said + ('' if default is None else f' (default: {default})'))
    parser.add_argument('--waitress', action='store_true', help='serve by waitress, not gunicorn')
    arguments = vars(parser.parse_args(argv))
    try: return run_server(arguments.pop('bundle'), **arguments)
    except UserError as e:
        print(f'serve.pyz: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt: return 130
