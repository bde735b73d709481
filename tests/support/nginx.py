"""A real nginx in front of a site."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import free_port
from tests.support.programs import required
from tests.support.waiting import PATIENCE_S, eventually_sync

# Except for the server, these are the defaults of nginx that Debian's nginx.conf keeps.
FRAME = """
daemon off;
master_process off;
pid {directory}/pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port}{tls};
        {server}
    }}
}}
"""
TLS = " ssl;\n        ssl_certificate {directory}/cert.pem;\n        ssl_certificate_key {directory}/key.pem"


@contextmanager
def nginx(directory: Path, server: str, *, tls: bool = False) -> Iterator[int]:
    """An nginx with the directives `server` in its only server, with a self-signed certificate if `tls`; its port."""
    port = free_port()
    if tls:
        make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -keyout key.pem -out cert.pem"
        subprocess.run(make.split(), cwd=directory, check=True, capture_output=True)
    config = directory / "nginx.conf"
    tls_lines = TLS.format(directory=directory) if tls else ""
    config.write_text(FRAME.format(directory=directory, port=port, tls=tls_lines, server=server))
    errors = directory / "error.log"
    process = subprocess.Popen([required("nginx-light", "nginx"), "-c", config, "-e", errors], stdin=subprocess.DEVNULL)
    try:
        eventually_sync(lambda: (directory / "pid").exists() or process.poll() is not None)
        assert process.poll() is None, errors.read_text()
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
