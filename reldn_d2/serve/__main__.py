r"""Serve one model over HTTP, with a page to try it.

Examples::

    python -m reldn_d2.serve --checkpoint model_final.pth
    python -m reldn_d2.serve --pretrained vrd_boxes --port 8080
    python -m reldn_d2.serve --pretrained vrd_boxes \
        --detector torchvision:fasterrcnn_resnet50_fpn_v2

Open http://127.0.0.1:8000 for the page; docs/serve.md describes the requests. There is no password:
other machines reach the service only with --host, which should stand behind a proxy then.
"""

import argparse
import logging
import signal
import socket
import sys
from typing import Any

import reldn_d2  # noqa: F401  # isort: skip  must be imported before Detectron2
from ..predictor import RelationPredictor
from ..pretrained import load_detector
from ..scripts.model_options import (
    add_checkpoint_options,
    checkpoint_path,
    fraction,
    positive,
    threshold_options,
)
from ..utils.programs import program_help
from ..utils.user_modules import parse_and_import

__all__ = ["build_parser", "main"]

logger = logging.getLogger("reldn_d2.serve")

# Modules of the extra `serve` and the packages that have them.
PACKAGES = {
    "fastapi": "fastapi",
    "starlette": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="reldn-serve",
        description=program_help(__doc__, __file__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_options(parser, required=True)
    parser.add_argument(
        "--detector",
        metavar="NAME",
        help="finds the entities of images without boxes: a config of Detectron2's model zoo, the "
        "path of a YAML file or LazyConfig, torchvision:NAME, or transformers:NAME_OR_FOLDER",
    )
    parser.add_argument("--detector-weights", metavar="FILE", help="weights of --detector")
    parser.add_argument(
        "--confidence-threshold",
        type=fraction,
        metavar="SCORE",
        help="min score of a detection; default: the config's; of --detector: 0.5",
    )
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine"
    )
    parser.add_argument("--port", type=_port, default=8000, help="default: 8000; 0: any free one")
    for option, default, unit in (
        ("max-megabytes", 10, "size of an image file"),
        ("max-megapixels", 25, "size of an image"),
        ("max-boxes", 200, "boxes per request"),
        ("max-requests", 64, "requests at the same time; further ones get status 503"),
        ("batch-size", 8, "images per model call"),
        ("timeout", 30, "seconds to receive a request, and again to answer it"),
    ):
        parser.add_argument(
            f"--{option}",
            type=positive,
            default=default,
            metavar="N",
            help=f"most {unit}; default: {default}",
        )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE config overrides"
    )
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:  # larger ones would be taken modulo 65536
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return value


def build_application(args: argparse.Namespace) -> Any:
    """Load the model and the detector and return the application.

    Raises:
        OSError, ValueError, ImportError: one of them cannot be loaded, or a package is missing.
    """
    import python_multipart  # noqa: F401  (FastAPI imports it only with the first form)

    from .request_reader import Limits
    from .service import create_app

    path = checkpoint_path(args)
    opts = list(args.opts)
    detector = None
    if args.detector is not None:
        options = {}
        if args.confidence_threshold is not None:
            options["min_score"] = args.confidence_threshold
        detector = load_detector(args.detector, args.detector_weights, args.device, **options)
    elif args.detector_weights is not None:
        raise ValueError("--detector-weights: add --detector, which they belong to")
    else:
        opts = threshold_options(args.confidence_threshold) + opts
    predictor = RelationPredictor.from_checkpoint(path, args.device, args.config_file, opts)
    limits = Limits(
        max_bytes=args.max_megabytes * 1_000_000,
        max_pixels=args.max_megapixels * 1_000_000,
        max_boxes=args.max_boxes,
        max_requests=args.max_requests,
        batch_size=args.batch_size,
        seconds=args.timeout,
    )
    return create_app(predictor, detector, limits, args.pretrained or args.checkpoint)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, before the model is loaded.

    Raises:
        ValueError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error}") from None
    return listener


def server_config(application: Any, seconds: float) -> Any:
    """Return uvicorn's settings.

    Args:
        application: of :func:`build_application`.
        seconds: to receive a request, and again to answer it; at shutdown, requests that have
            begun get both.
    """
    import uvicorn

    return uvicorn.Config(
        application,
        http="h11",
        ws="none",
        access_log=False,
        log_config=None,  # main() has set up logging
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(2 * seconds) + 5,
        limit_concurrency=1000,  # connections
    )


def _stop(*_: Any) -> None:
    """Exit with status 0: stopping a service is not a failure."""
    sys.exit(0)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT (Ctrl-C) and return the exit status."""
    args = parse_and_import(build_parser(), arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    try:
        import uvicorn

        listener = bind(args.host, args.port)
        application = build_application(args)
        listener.listen(128)  # connections wait until uvicorn takes them
        host, port = listener.getsockname()[:2]
        logger.info(f"http://{f'[{host}]' if ':' in host else host}:{port} answers from now on")
        if host not in ("127.0.0.1", "::1"):
            logger.warning("other machines may reach this service, which has no password")
        uvicorn.Server(server_config(application, args.timeout)).run(sockets=[listener])
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        print(
            f"reldn-serve: {PACKAGES[error.name]} is not installed: pip install 'reldn_d2[serve]', "
            f"or pip install {' '.join(PACKAGES.values())}",
            file=sys.stderr,
        )
        return 1
    except (OSError, ValueError, ImportError) as error:
        print(f"reldn-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
