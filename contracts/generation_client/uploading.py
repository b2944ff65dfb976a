"""The HTTP POST of one file to the object store, with a form that a worker has signed."""

import aiohttp

from generation_client.errors import UploadFailed
from generation_contracts import UploadReply

UPLOAD_TIMEOUT = 300.0  # seconds for one file
_REFUSED = 300  # statuses from here on; redirects are not followed


async def post_form(form: UploadReply, data: bytes, media_type: str) -> None:
    """Upload one file.

    Raises:
        UploadFailed: The store refuses the file or is not reachable. The text has the address,
            which is no credential: the signature is in the fields.
    """
    body = aiohttp.FormData()
    for name, value in form.fields.items():
        body.add_field(name, value)
    # The store ignores all fields after the file.
    body.add_field("file", data, filename="file", content_type=media_type)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=UPLOAD_TIMEOUT)) as session,
            session.post(form.url, data=body, allow_redirects=False) as response,
        ):
            status = response.status
    except (aiohttp.ClientError, TimeoutError) as error:
        raise UploadFailed(f"{form.url}: {type(error).__name__}") from None
    if status >= _REFUSED:
        raise UploadFailed(f"{form.url}: the store refuses the upload (HTTP {status})")
