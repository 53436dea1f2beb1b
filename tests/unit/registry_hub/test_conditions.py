"""Range and conditional requests, as RFC 9110 has them."""

import pytest

from registry.hub.conditions import Answer, decide

E = "e" * 40
SIZE = 1000
WHOLE = Answer(200, 0, SIZE)


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({}, WHOLE),
        ({"range": "bytes=0-0"}, Answer(206, 0, 1)),
        ({"range": "bytes=5-"}, Answer(206, 5, SIZE)),
        ({"range": "bytes=5-2999999"}, Answer(206, 5, SIZE)),
        ({"range": "bytes=-10"}, Answer(206, 990, SIZE)),
        ({"range": "bytes=-5000"}, Answer(206, 0, SIZE)),
        ({"range": f"bytes={SIZE}-"}, Answer(416)),
        ({"range": "bytes=-0"}, Answer(416)),
        ({"range": "bytes=9-5"}, WHOLE),
        ({"range": "bytes=0-1,3-4"}, WHOLE),
        ({"range": "lines=0-1"}, WHOLE),
        ({"range": "bytes=x"}, WHOLE),
        ({"if-none-match": f'"{E}"'}, Answer(304)),
        ({"if-none-match": f'W/"{E}"'}, Answer(304)),
        ({"if-none-match": f'"x", "{E}"'}, Answer(304)),
        ({"if-none-match": "*"}, Answer(304)),
        ({"if-none-match": '"x"'}, WHOLE),
        ({"if-none-match": f'"{E}"', "range": "bytes=0-0"}, Answer(304)),
        ({"if-none-match": '"x"', "range": "bytes=0-0"}, Answer(206, 0, 1)),
        ({"if-range": f'"{E}"', "range": "bytes=1-2"}, Answer(206, 1, 3)),
        ({"if-range": '"x"', "range": "bytes=1-2"}, WHOLE),
        ({"if-range": f'W/"{E}"', "range": "bytes=1-2"}, WHOLE),
        ({"if-range": "Wed, 21 Oct 2015 07:28:00 GMT", "range": "bytes=1-2"}, WHOLE),
    ],
)
def test_table(headers, answer):
    assert decide(headers, E, SIZE) == answer


def test_an_empty_file_has_no_range():
    assert decide({}, E, 0) == Answer(200, 0, 0)
    assert decide({"range": "bytes=0-"}, E, 0) == Answer(416)


def test_content_range():
    assert decide({"range": "bytes=5-6"}, E, SIZE).headers(SIZE) == [("content-range", "bytes 5-6/1000")]
    assert Answer(416).headers(SIZE) == [("content-range", "bytes */1000")]
    assert WHOLE.headers(SIZE) == []
