"""fsspec's S3 file system with one request and one round trip per object, and without retries.

The only module that knows s3fs and botocore.
"""

from datetime import datetime
from http import HTTPStatus
from typing import Any, ClassVar

from aiobotocore.session import AioSession
from botocore.handlers import add_expect_header
from botocore.utils import parse_timestamp
from fsspec.asyn import sync
from s3fs import S3FileSystem

from cluster.storage.stored_objects import ListedPage, StoredObject

_NAMES_OF_PAGE = 1000
"""The most that S3 gives."""


class DirectS3FileSystem(S3FileSystem):
    """S3, with each object's body sent right behind its request's head.

    By default botocore sends ``Expect: 100-continue`` and waits for the server's answer before it sends the body: one
    more round trip for each object. Most servers would take the body at once; one that refuses it gets it in vain.
    """

    retries: ClassVar[int] = 1  # else the store's retries multiply with these, which come on top of botocore's

    def __init__(self, **options: Any) -> None:
        session: Any = AioSession()
        session.unregister("before-call.s3", add_expect_header)
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_timestamp)
        super().__init__(**{"session": session, **options})  # s3fs keeps a session that it is given, also to reconnect

    def list_page(self, path: str, after: str | None) -> ListedPage:
        """Returns a page of what lies in a folder, see ``cluster.storage.listings.list_pages``.

        ``ls`` makes a dictionary of 1 KB for each name of a folder before it returns any.
        """
        page: ListedPage = sync(self.loop, self._list_page, path, after)
        return page

    async def _list_page(self, path: str, after: str | None) -> ListedPage:
        bucket, key, _ = self.split_path(path)
        prefix = f"{key.rstrip('/')}/" if key else ""
        token = {} if after is None else {"ContinuationToken": after}
        answer: dict[str, Any] = await self._call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=_NAMES_OF_PAGE, **token
        )
        names = ((entry["Key"].removeprefix(prefix), entry) for entry in answer.get("Contents", ()))
        return ListedPage(
            folders=[entry["Prefix"].removeprefix(prefix)[:-1] for entry in answer.get("CommonPrefixes", ())],
            # A name that ends in / is a placeholder that some tools write for an empty folder: here, for this one.
            objects=[StoredObject(name, entry["Size"], entry.get("ETag", "")) for name, entry in names if name],
            after=answer["NextContinuationToken"] if answer.get("IsTruncated") else None,
        )

    async def _cat_file(self, path: str, **kwargs: Any) -> bytes:
        try:
            data: bytes = await super()._cat_file(path, **kwargs)
        except OSError as error:
            answer: dict[str, Any] = getattr(error.__cause__, "response", {})
            if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""  # the object ends before the range begins
            raise
        return data


def _parse_timestamp(text: Any) -> datetime:
    """Parses the time of an object; botocore's own parser is slower than the rest of a listing."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):  # another format
        parsed: datetime = parse_timestamp(text)
        return parsed
