"""E-mail addresses, numbers of telephones, cards, accounts, identity cards and hosts."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.rules.base import Document, Rule
from fastft.data.formats.base import DATA_EXTRA
from fastft.errors import UserError

Kind = Literal["email", "iban", "cn_id", "card", "us_ssn", "es_id", "ip", "phone"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # what is one kind is not looked at as one behind it
AROUND = 40  # characters before and behind a run of digits that may be part of the number

EMAIL = re.compile(r"(?<![\w.%+-])[\w%+-](?:[\w.%+-]{0,62}[\w%+-])?@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
# Seven digits or more with little between them, or four numbers and three points: most texts have few.
RUN = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9](?:[ \u00a0().\-/]{0,3}[0-9]){6,}")
IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.[0-9])")
PATTERNS: dict[Kind, re.Pattern[str]] = {
    "iban": re.compile(r"(?<!\w)[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,4})?)(?!\w)"),
    "cn_id": re.compile(r"(?<![0-9A-Za-z])[0-9]{17}[0-9Xx](?![0-9A-Za-z])"),
    "card": re.compile(
        r"(?<![\w.-])(?:[0-9]{13,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{3})?"
        r"|[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5})(?![\w-]|\.[0-9])"
    ),
    "us_ssn": re.compile(
        r"(?<![\w.-])[0-9]{3}-[0-9]{2}-[0-9]{4}(?![\w-])|(?<![\w.-])[0-9]{3} ?[0-9]{2} ?[0-9]{4}(?!\w)"
    ),
    "es_id": re.compile(r"(?<![\w.-])(?:[0-9]{8}|[XYZ][ -]?[0-9]{7})[ -]?[A-Z](?!\w)"),
    "ip": re.compile(r"(?<![\w.-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])"),
}
ISSUERS = re.compile(  # and their lengths: Visa, Mastercard, Amex, Diners, JCB, Discover, UnionPay
    r"4[0-9]{15}|(?:5[1-5]|2[2-7])[0-9]{14}|3[47][0-9]{13}|3[068][0-9]{12}|35[0-9]{14}|(?:6011|64[4-9][0-9]|65[0-9]{2}|62[0-9]{2})[0-9]{12,15}"
)
PROVINCES = {f"{n}" for n in (*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55))}
PROVINCES |= {f"{n}" for n in (*range(61, 66), 71, 81, 82, 83)}
SOCIAL = re.compile(r"(?:\bSSN|social security)\D{0,20}$", re.IGNORECASE)
NUMBERED = re.compile(
    r"(?:\b(?:v|ver|version|release|section|sect?|chapter|figure|fig|table|clause|rule|firmware|build)"
    r"|§)\W{0,3}$",
    re.IGNORECASE,
)
CALLED = re.compile(
    r"(?:\b(?:tel|phone|telephone|call|fax|mobile|cell|whatsapp|sms|contact|hotline|ring|dial|telefon"
    r"|tel[ée]fono|m[óo]vil|t[ée]l|t[ée]l[ée]phone|handy)\b|电话|電話|手机|手機|传真|热线|联系)\D{0,16}$",
    re.IGNORECASE,
)


class PersonalDataSettings(Section):
    """What is masked."""

    kinds: list[Kind] = Field(
        list(KINDS),
        min_length=1,
        description="email; iban (accounts, by checksum); card (payment cards, by checksum and issuer); us_ssn, cn_id, "
        "es_id (numbers of persons in the United States, China and Spain: DNI and NIE; by their checksums, where they "
        "have one); ip (versions 4 and 6); phone.",
    )
    regions: list[str] = Field(
        ["US"],
        description="Countries (ISO 3166: US, DE) whose telephone numbers are known without + and country code: in the "
        "country's own groups of digits, or behind a word such as phone. With + those of all countries are.",
    )
    write: dict[Kind, str] = Field({}, description="What is written instead, by kind; default: <EMAIL>, <PHONE>, ...")

    scalar = "kinds"

    @field_validator("kinds", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@rooms.RULES.register("personal_data")
class PersonalData(Rule):
    """Masks personal data: e-mail addresses, numbers of telephones, cards, accounts, persons and hosts."""

    Settings = PersonalDataSettings
    order = 90

    def __init__(self, settings: PersonalDataSettings):
        super().__init__(settings)
        self.kinds = [kind for kind in KINDS if kind in settings.kinds]
        self.write = {kind: settings.write.get(kind, f"<{kind.upper()}>") for kind in self.kinds}
        try:
            import phonenumbers
            from stdnum import iban, luhn
            from stdnum.cn import ric
            from stdnum.es import dni, nie
            from stdnum.us import ssn
        except ImportError as e:
            raise UserError(f"rules.personal_data: {e.name} is not installed.", DATA_EXTRA) from None
        self.phones = phonenumbers
        for region in settings.regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise UserError(f"rules.personal_data.regions: {region!r} is no country known.", "Such as US, DE, CN.")
        self.regions: list[str | None] = [*settings.regions] or [None]
        self.checks: dict[Kind, Callable[[str, int, str], bool]] = {
            "iban": lambda text, at, found: iban.is_valid(found, check_country=False),
            "cn_id": lambda text, at, found: self._is_resident(found, ric),
            "card": lambda text, at, found: self._is_card(found, luhn),
            "us_ssn": lambda text, at, found: (
                ssn.is_valid(found) and (found.count("-") == 2 or bool(SOCIAL.search(text, max(0, at - AROUND), at)))
            ),
            "es_id": lambda text, at, found: dni.is_valid(found) or nie.is_valid(found),
            "ip": self._is_ip,
        }

    def apply(self, document: Document) -> str | None:
        text = document.text
        spans = list(self._spans(text))
        if not spans:
            return None
        parts, end = list[str](), 0
        for start, stop, kind in sorted(spans):
            parts += [text[end:start], self.write[kind]]
            end = stop
            self.found[kind] += 1
        document.text = "".join([*parts, text[end:]])
        return None

    def _spans(self, text: str) -> Iterator[tuple[int, int, Kind]]:
        """Where what is, not overlapping."""
        taken = list[tuple[int, int]]()

        def free(start: int, end: int) -> bool:
            if any(start < stop and begin < end for begin, stop in taken):
                return False
            taken.append((start, end))
            return True

        if "email" in self.kinds and "@" in text:
            for match in EMAIL.finditer(text):
                if free(*match.span()):
                    yield *match.span(), "email"
        if "ip" in self.kinds and ("::" in text or text.count(":") > 6):
            for match in IP6.finditer(text):
                if self._is_ip6(match[0]) and free(*match.span()):
                    yield *match.span(), "ip"
        for run in RUN.finditer(text):
            start, end = max(0, run.start() - AROUND), run.end() + AROUND
            for kind in self.kinds:
                for match in PATTERNS[kind].finditer(text, start, end) if kind in PATTERNS else ():
                    inside = match.start() < run.end() and run.start() < match.end()
                    if inside and self.checks[kind](text, match.start(), match[0]) and free(*match.span()):
                        yield *match.span(), kind
            if "phone" in self.kinds:
                for first, last in self._phones(text, run.start(), run.end()):
                    if free(first, last):
                        yield first, last, "phone"

    def _phones(self, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        start = max(0, start - 3)  # +, (, and what makes it none
        window = text[start : end + 3]
        if sum(map(str.isdigit, window)) < 7:
            return
        for region in self.regions:
            for match in self.phones.PhoneNumberMatcher(window, region):
                first, raw = start + match.start, match.raw_string
                if raw[0] == "(" and ")" not in raw:  # around the number, not in it
                    first, raw = first + 1, raw[1:]
                if raw.startswith(("+", "00")) or self._is_national(text, first, match):
                    yield first, start + match.end

    def _is_national(self, text: str, at: int, match: Any) -> bool:
        """Written in the country's own groups, or behind a word that says what it is."""
        national = self.phones.format_number(match.number, self.phones.PhoneNumberFormat.NATIONAL)
        groups, own = (re.findall(r"\d+", one) for one in (match.raw_string, national))
        grouped = len(own) > 1 and own in (groups, groups[1:])
        return grouped or bool(CALLED.search(text, max(0, at - AROUND), at))

    @staticmethod
    def _is_resident(found: str, ric: Any) -> bool:
        """By province, date of birth and checksum: a person keeps a place's number that there is no more."""
        if found[:2] not in PROVINCES or ric.calc_check_digit(found) != found[-1].upper():
            return False
        try:
            return 1900 <= ric.get_birth_date(found).year <= 2100
        except ValueError:  # stdnum's are, too
            return False

    @staticmethod
    def _is_card(found: str, luhn: Any) -> bool:
        digits = re.sub(r"\D", "", found)
        return bool(ISSUERS.fullmatch(digits)) and luhn.is_valid(digits)

    @staticmethod
    def _is_ip(text: str, at: int, found: str) -> bool:
        parts = found.split(".")
        proper = all(int(part) <= 255 and (part == "0" or part[0] != "0") for part in parts)
        return proper and parts[0] != "0" and not NUMBERED.search(text, max(0, at - AROUND), at)

    @staticmethod
    def _is_ip6(found: str) -> bool:
        try:
            ipaddress.IPv6Address(found)
        except ValueError:
            return False
        return sum(char.isdigit() for char in found) >= 2 and found.count(":") >= 3

    @classmethod
    def versions(cls) -> dict[str, str]:
        from importlib.metadata import version

        return {name: version(name) for name in ("phonenumbers", "python-stdnum")}
