"""What both engines need of S3 beside reading and writing: the usual chain of credentials, and interrupted uploads.

botocore has both: environment, shared configuration files with profiles, SSO, assumed roles, web identity, containers
and instances, in AWS' own order.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from helios.errors import Unavailable
from heliosfs.store.remote import refused, told

if TYPE_CHECKING:
    from heliosfs.store.cloud import Place

ASK_AGAIN_S: Final = 300.0
"""The chain is asked for credentials again after so many seconds; it renews those that expire itself."""


class Chain:
    """The credentials and the region that the usual chain gives."""

    def __init__(self) -> None:
        import botocore.exceptions
        import botocore.session

        self.session = botocore.session.Session()
        try:
            self._credentials = self.session.get_credentials()
            self.region: str | None = self.session.get_config_variable("region")
        except botocore.exceptions.BotoCoreError as error:
            raise Unavailable(f"no credentials for S3: {told(error)}") from None
        if self._credentials is None:
            raise Unavailable(
                "no credentials for S3 were found",
                hint="Give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in ~/.aws/credentials (AWS_PROFILE), "
                "or by a role of the instance, the container or the service account.",
            )

    def __call__(self) -> dict[str, Any]:
        """In the form that obstore takes."""
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=ASK_AGAIN_S),
        }

    def client(self, endpoint: str, region: str) -> Any:
        """A client of S3."""
        from botocore.config import Config

        # For upkeep only, which comes again: it may not hold up a registry that is to end.
        config = Config(connect_timeout=3, read_timeout=8, retries={"max_attempts": 1, "mode": "standard"})
        return self.session.create_client(
            "s3", endpoint_url=endpoint or None, region_name=region or self.region or "us-east-1", config=config
        )


def abandon_at(chain: Chain, place: Place, older_than_s: float) -> int:
    """``abandon`` for a store's place."""
    client = chain.client(place.endpoint, place.region)
    try:
        return abandon(client, place.bucket, f"{place.prefix}/" if place.prefix else "", older_than_s)
    finally:
        client.close()


def abandon(client: Any, bucket: str, prefix: str, older_than_s: float) -> int:
    """Abort the uploads in parts below the prefix that were begun so long ago; returns how many."""
    import botocore.exceptions

    limit = datetime.now(UTC) - timedelta(seconds=older_than_s)
    count = 0
    try:
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", ()):
                if upload["Initiated"] <= limit:
                    client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                    count += 1
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise refused(f"s3://{bucket}", error) from None
    return count
