"""fsspec's S3 file system with one request and one round trip per object, and without retries.

The only module that knows s3fs and botocore.
"""

from http import HTTPStatus
from typing import Any, ClassVar

from aiobotocore.session import AioSession
from botocore.handlers import add_expect_header
from s3fs import S3FileSystem


class DirectS3FileSystem(S3FileSystem):
    """S3, with each object's body sent right behind its request's head.

    By default botocore sends ``Expect: 100-continue`` and waits for the server's answer before it sends the body: one
    more round trip for each object. Most servers would take the body at once; one that refuses it gets it in vain.
    """

    retries: ClassVar[int] = 1  # else the store's retries multiply with these, which come on top of botocore's

    def __init__(self, **options: Any) -> None:
        session: Any = AioSession()
        session.unregister("before-call.s3", add_expect_header)
        super().__init__(**{"session": session, **options})  # s3fs keeps a session that it is given, also to reconnect

    async def _cat_file(self, path: str, **kwargs: Any) -> bytes:
        try:
            data: bytes = await super()._cat_file(path, **kwargs)
        except OSError as error:
            answer: dict[str, Any] = getattr(error.__cause__, "response", {})
            if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""  # the object ends before the range begins
            raise
        return data
