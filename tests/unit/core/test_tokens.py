"""The lines of a token file."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.errors import ConfigurationError
from services.core.tokens import Scope, Token, digest_of, new_secret, parse, render

DIGEST = "a" * 64
TOKENS = st.builds(
    Token,
    name=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    digest=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    scopes=st.frozensets(st.sampled_from(Scope), min_size=1),
    prefix=st.from_regex(r"[A-Za-z0-9_-]{0,20}", fullmatch=True),
    expires=st.none() | st.integers(0, 2**32).map(lambda moment: datetime.fromtimestamp(moment, UTC)),
)


@given(st.lists(TOKENS, max_size=5, unique_by=(lambda one: one.name, lambda one: one.digest)))
def test_what_is_written_is_read_again(tokens: list[Token]) -> None:
    """Also a file without any: revoking the last one must not make it look like one that was cut off."""
    assert {token.digest: token for token in tokens} == parse(render(tokens))


def test_comments_and_empty_lines_are_passed_over() -> None:
    """For people who write the file by hand; without an end there is none."""
    found = parse(f"# of the ward\n\n  ward {DIGEST} read,write * # until further notice\n")
    assert {DIGEST: Token("ward", DIGEST, frozenset({Scope.READ, Scope.WRITE}))} == found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"ward {DIGEST} read", "expected: name"),
        (f"ward {DIGEST} read * - more", "expected: name"),
        (f"w/rd {DIGEST} read *", "a name is"),
        (f".ward {DIGEST} read *", "a name is"),
        (f"ward {DIGEST[1:]} read *", "a SHA-256 is"),
        (f"ward {DIGEST.upper()} read *", "a SHA-256 is"),
        (f"ward {DIGEST} raed *", "scopes are"),
        (f"ward {DIGEST} read, *", "scopes are"),
        (f"ward {DIGEST} read visit-", "a prefix is"),
        (f"ward {DIGEST} read vi*sit*", "a prefix is"),
        (f"ward {DIGEST} read * tomorrow", "an expiry is"),
        (f"ward {DIGEST} read * 2027-01-31T12:00:00", "needs a time zone"),
        (f"ward {DIGEST} read * 9999-12-31T23:59:59-01:00", "within the years"),
        (f"ward {DIGEST} read *\nward {'b' * 64} read *", "twice"),
        (f"ward {DIGEST} read *\nother {DIGEST} read *", "twice"),
    ],
)
def test_a_line_that_is_none_is_told_by_its_number_alone(line: str, expected: str) -> None:
    """What stands there instead of a hash may be a token."""
    with pytest.raises(ConfigurationError, match=expected) as caught:
        parse(f"# tokens\n{line}\n")
    assert f"line {1 + len(line.splitlines())} of the token file" in str(caught.value)
    assert DIGEST[1:] not in str(caught.value).lower()


def test_an_empty_file_is_refused() -> None:
    """A file that is just being written looks like this; it would refuse every client."""
    with pytest.raises(ConfigurationError, match="empty"):
        parse(" \n")


@pytest.mark.parametrize(("value", "expected"), [("2027-01-31", 0), ("2027-01-31T12:00:00Z", 12)])
def test_an_end_is_a_date_or_a_time(value: str, expected: int) -> None:
    """A date ends as it begins, in UTC."""
    (token,) = parse(f"ward {DIGEST} read * {value}").values()
    assert datetime(2027, 1, 31, expected, tzinfo=UTC) == token.expires


@pytest.mark.parametrize(
    ("scopes", "asked", "consultation", "expected"),
    [
        ({Scope.READ}, Scope.READ, None, True),
        ({Scope.READ}, Scope.WRITE, None, False),
        ({Scope.WRITE}, Scope.READ, None, False),
        ({Scope.ADMIN}, Scope.READ, "visit-1", True),
        ({Scope.ADMIN}, Scope.WRITE, "other-1", False),
        ({Scope.ADMIN}, Scope.OPS, "visit-1", True),
        ({Scope.READ, Scope.WRITE}, Scope.OPS, "visit-1", False),
        ({Scope.OPS}, Scope.READ, "visit-1", False),
        ({Scope.OPS}, Scope.OPS, "", False),
        ({Scope.READ}, Scope.READ, "visit-1", True),
        ({Scope.READ}, Scope.READ, "visit", False),
        ({Scope.READ}, Scope.READ, "", False),
    ],
)
def test_a_token_is_for_its_scopes_and_its_consultations(
    scopes: set[Scope], asked: Scope, consultation: str | None, expected: bool
) -> None:
    """admin includes the other scopes, and no other consultations."""
    assert expected == Token("ward", DIGEST, frozenset(scopes), "visit-").may(asked, consultation)


def test_a_secret_cannot_be_guessed_nor_read_off_its_hash() -> None:
    """256 random bits."""
    first, second = new_secret(), new_secret()
    assert first != second
    assert (43, 64) == (len(first), len(digest_of(first)))


def test_of_a_file_that_is_none_only_the_first_lines_are_named() -> None:
    """A wrong file has many of them."""
    with pytest.raises(ConfigurationError) as refused:
        parse("no token\n" * 8)
    assert 4 == len(refused.value.problems)
    assert "and 5 lines more" == refused.value.problems[-1]
