"A bundle behind a web server."
from fastrecipes.arguments import checked

__all__ = ['serve']


@checked
def serve(bundle: str, *, port: int = 5000, host: str = '127.0.0.1', workers: int | None = None, threads: int = 64, max_mb: float = 16., timeout: int = 30,
          waitress: bool = False) -> int:
    """Serve a shipped bundle: POST an image to /predict, or open the page in a browser; Ctrl-C or SIGTERM end it once requests under way are answered.

    `curl -X POST -F my_img_file=@cardigan.jpg http://localhost:5000/predict` gives the five best labels and their probabilities as JSON. Also /healthz,
    /readyz, /metrics (Prometheus) and /openapi.json. Needs flask and gunicorn (fastrecipes[serve]); no torch. Raises `ValueError` and
    `FileNotFoundError` before anything is served: no bundle or a changed one, a port in use, a server that is not installed.

    Args:
        bundle: the folder that `fastrecipes ship` wrote
        port: where to listen; 0 for any port that is free
        host: 127.0.0.1 for this machine alone, 0.0.0.0 for all who reach it
        workers: processes, each with a model of its own (default: one a core)
        threads: requests that a process reads and answers at once, at least 2
        max_mb: the largest upload, MB
        timeout: seconds that a request may take to arrive
        waitress: serve by waitress (one process, any system) instead of gunicorn
    """
    from fastrecipes.errors import NotThere
    try: from fastrecipes.production.serving import run_server
    except ImportError as e: raise NotThere(f'serve: {e.name} is not installed; pip install "fastrecipes[serve]"') from None
    return run_server(bundle, port=port, host=host, workers=workers, threads=threads, max_mb=max_mb, timeout=timeout, waitress=waitress)
