"""The lifecycle rule of the bucket: the store deletes uploaded inputs after a day."""

from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

RULE = "generation-uploads"
DAYS = 1  # the shortest that S3 has


def expire_uploads(client: Minio, bucket: str, prefix: str) -> bool:
    """Add the rule if it is missing; all other rules of the bucket stay.

    Returns:
        Whether the rule was added or changed.
    """
    wanted = Rule(
        ENABLED, rule_filter=Filter(prefix=prefix), rule_id=RULE, expiration=Expiration(days=DAYS)
    )
    found = client.get_bucket_lifecycle(bucket)
    rules = list(found.rules) if found is not None else []
    if any(_expires(rule, prefix) for rule in rules):
        return False
    others = [rule for rule in rules if rule.rule_id != RULE]
    client.set_bucket_lifecycle(bucket, LifecycleConfig([*others, wanted]))
    return True


def _expires(rule: Rule, prefix: str) -> bool:
    """Return whether a rule, also one of the operator, deletes the uploads after some days."""
    return (
        rule.status == ENABLED
        and rule.rule_filter is not None
        and rule.rule_filter.prefix == prefix
        and rule.expiration is not None
        and rule.expiration.days is not None
    )
