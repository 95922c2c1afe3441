"""fsspec's file system over S3, made fit for a store: one request and one round trip for an object, no retries.

The only module that knows s3fs and botocore.
"""

from typing import Any, ClassVar

from aiobotocore.session import AioSession
from botocore.handlers import add_expect_header
from s3fs import S3FileSystem


class DirectS3FileSystem(S3FileSystem):
    """Objects of S3, each sent together with the head of its request.

    As botocore has it, a request with ``Expect: 100-continue`` waits for the server's word before it sends its body,
    one round trip more for each object. Most servers would take the body at once; one that refuses gets it in vain.
    """

    retries: ClassVar[int] = 1  # the store's own retries would multiply with these, which are beside botocore's

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.session: Any = AioSession(**self.kwargs)  # as s3fs makes it
        self.session.unregister("before-call.s3", add_expect_header)
