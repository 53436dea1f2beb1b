"""The operator's hook, asked to start a worker of a model that is at the registry and that nobody serves."""

from __future__ import annotations

from helios.config import AdmissionSettings
from helios.errors import Unavailable
from router.admission.wake_hook import Unasked, WakeHook, hook_of
from router.admission.waking import WakeFailed
from router.discovery.availability import Report, Waker
from router.discovery.models import Name


class ModelHook:
    """A ``Waker`` of discovery: tells the hook which commit it is about."""

    def __init__(self, hook: WakeHook | Unasked) -> None:
        self._hook = hook

    async def wake(self, name: Name, commit: str, report: Report) -> None:
        try:
            await self._hook.wake(name.repo.id, report, commit, name.rev)
        except WakeFailed as error:
            raise Unavailable(f"it could not be started: {error}") from None


def waker(settings: AdmissionSettings) -> Waker | None:
    """The one that the settings name; raises UsageError."""
    hook = hook_of(settings)
    return None if hook is None else ModelHook(hook)
