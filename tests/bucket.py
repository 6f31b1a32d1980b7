"""A bucket that is not there: what gs:// paths need of Cloud Storage, on this machine.

tensorstore speaks to it over HTTP (its JSON API), and so does `Objects`, which is here what gcsfs
is elsewhere. As in a bucket there are objects alone, directories are prefixes of their names, an
object appears whole once it is written, and none is renamed.
"""

import http.server
import io
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.registry import _registry

URL = "TENSORSTORE_GCS_HTTP_URL"


class Objects(fsspec.AbstractFileSystem):
    """gs:// for etils.epath, of this process and of others that have the environment."""

    protocol = ("gcs", "gs")
    cachable = False

    def ls(self, path: str, detail: bool = True, **_) -> list:
        path = self._strip_protocol(path)
        bucket, _, prefix = path.partition("/")
        found = {}
        for item in _ask("GET", bucket, prefix=prefix)["items"]:
            name = f"{bucket}/{item['name']}"
            child, _, below = name.removeprefix(path).removeprefix("/").partition("/")
            if name == path:
                found[name] = {"size": int(item["size"]), "type": "file"}
            elif name.startswith(f"{path}/"):
                kind = {"size": 0, "type": "directory"} if below else {
                    "size": int(item["size"]), "type": "file"}
                found[f"{path}/{child}"] = kind
        if not found:
            raise FileNotFoundError(path)
        return [{"name": n} | x for n, x in found.items()] if detail else sorted(found)

    def _open(self, path: str, mode: str = "rb", **_) -> io.BytesIO:
        if mode == "rb":
            return io.BytesIO(_ask("GET", *path.split("/", 1), alt="media"))
        if mode != "wb":
            raise NotImplementedError(f"objects are not opened as {mode}")
        return _Upload(path)

    def mkdir(self, path: str, create_parents: bool = True, **_) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def rm_file(self, path: str) -> None:
        _ask("DELETE", *path.split("/", 1))

    def rm(self, path: str, recursive: bool = False, maxdepth=None) -> None:
        for name in self.find(path) if recursive else [self._strip_protocol(path)]:
            self.rm_file(name)


class _Upload(io.BytesIO):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def close(self) -> None:
        if not self.closed:
            bucket, name = self.path.split("/", 1)
            _ask("POST", bucket, data=self.getvalue(), name=name)
        super().close()


def _ask(method: str, bucket: str, of: str = "", data: bytes | None = None, **query: str):
    """The answer to a request about a bucket, or an object of it: bytes, or what JSON says."""
    of = of and "/" + urllib.parse.quote(of, safe="")
    url = f"{os.environ[URL]}/b/{bucket}/o{of}?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(url, data, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers.get_content_type() else body
    except urllib.error.HTTPError as error:
        raise FileNotFoundError(url) from error


class _Api(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held: dict[str, bytes] = {}

    def _parts(self) -> tuple[str, str, dict[str, str]]:
        """(bucket, object or "", query)."""
        url = urllib.parse.urlsplit(self.path)
        parts = url.path.partition("/b/")[2].split("/", 2)
        query = dict(urllib.parse.parse_qsl(url.query))
        return parts[0], urllib.parse.unquote(parts[2]) if len(parts) > 2 else "", query

    def _answer(self, code: int, body: bytes | dict = b"", **headers: str) -> None:
        self.send_response(code)
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content_Type": "application/json"}
        for name, value in (headers | {"Content_Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        bucket, name, query = self._parts()
        if not name:
            return self._list(bucket, query)
        data = self.held.get(f"{bucket}/{name}")
        if data is None:
            return self._answer(404)
        marks = {"x_goog_generation": "1", "x_goog_stored_content_length": str(len(data))}
        if not (asked := self.headers.get("Range")):
            return self._answer(200, data, **marks)
        first, last = asked.removeprefix("bytes=").split("-")
        begin = int(first) if first else len(data) - int(last)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        where = f"bytes {begin}-{end - 1}/{len(data)}"
        self._answer(206, data[begin:end], Content_Range=where, **marks)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        sizes = {x[len(bucket) + 1 :]: len(data) for x, data in list(self.held.items())
                 if x.startswith(f"{bucket}/")}
        begin, end = query.get("startOffset", ""), query.get("endOffset")
        names = [x for x in sorted(sizes) if x.startswith(query.get("prefix", ""))]
        names = [x for x in names if x >= begin and (not end or x < end)]
        self._answer(200, {"items": [{"name": x, "size": str(sizes[x])} for x in names]})

    def do_POST(self) -> None:
        bucket, _, query = self._parts()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.held[f"{bucket}/{query['name']}"] = data
        self._answer(200, {"name": query["name"], "generation": "1", "size": str(len(data))})

    def do_DELETE(self) -> None:
        bucket, name, _ = self._parts()
        self._answer(204 if self.held.pop(f"{bucket}/{name}", None) is not None else 404)

    def log_message(self, *_) -> None:
        pass


def reach() -> None:
    """gs:// leads to the bucket of the environment, if there is one."""
    if URL in os.environ:
        fsspec.register_implementation("gcs", Objects, clobber=True)


@contextmanager
def bucket() -> Iterator[dict[str, bytes]]:
    """While entered gs:// leads here: the objects, by "bucket/name"."""
    _Api.held = {}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ[URL] = f"http://127.0.0.1:{server.server_port}"
        os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
        reach()
        try:
            yield _Api.held
        finally:
            del os.environ[URL], os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"]
            _registry.pop("gcs")
            server.shutdown()
