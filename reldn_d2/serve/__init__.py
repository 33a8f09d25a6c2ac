"""An HTTP service around one model, and a page to try it: ``python -m reldn_d2.serve``.

It needs FastAPI, uvicorn and python-multipart, the extra ``serve`` of this package.
"""
