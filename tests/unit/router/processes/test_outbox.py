"""Words for another process: those of one turn in one message, which is bounded."""

from __future__ import annotations

import asyncio

from router.admission.line_words import MOST, Back, Freed, ToOwner
from router.processes.outbox import Outbox


def test_the_words_of_a_turn_go_together_in_order_and_not_too_many_at_a_time() -> None:
    sent: list[list[ToOwner]] = []

    async def main() -> None:
        outbox = Outbox(sent.append)
        for number in range(MOST + 1):
            outbox.append(Back(number))
        assert not sent
        await asyncio.sleep(0)
        outbox.append(Back(7))
        outbox.clear()  # of the one that owned the queue before
        outbox.append(Freed("m"))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert [len(words) for words in sent] == [MOST, 1, 1]
    assert [*sent[0], *sent[1]] == [Back(number) for number in range(MOST + 1)]
    assert sent[2] == [Freed("m")]
