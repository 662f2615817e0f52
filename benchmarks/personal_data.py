"""Planted personal data and the rule `personal_data` of `fastft prepare`: what is masked, and what is masked wrongly.

    python benchmarks/personal_data.py [--texts FILE.txt.gz ...] [--count 2000] [--machine NAME]

Every datum is made up: random digits with the checksum that its kind has, in the ways in which people write it, in a
sentence that mostly does not say what it is. Recall: of those the ones that are masked, wholly. What looks alike and is
none (dates, ISBNs, versions, DOIs, ...) is in sentences, too: masked ones are mistakes. Telephone numbers with + are
of twenty countries, those without of the United States, which is the rule's default.
"""

import argparse
import gzip
import random
import string
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from common import RESULTS, default_machine
from duplicates import table

SENTENCES = (
    "It is {} as we know.",
    "Please use {}, or write.",
    "({})",
    "{}",
    "We got {}. Then we left.",
    "See: {}; ok",
)
SAID = {"us_ssn": ("Her SSN is {}.", "social security number: {}"), "phone": ("Call {} now.", "Tel.: {}", "fax {}")}
COUNTRIES = [
    "US",
    "GB",
    "DE",
    "FR",
    "ES",
    "IT",
    "NL",
    "CN",
    "JP",
    "KR",
    "IN",
    "BR",
    "MX",
    "AU",
    "ZA",
    "SE",
    "PL",
    "CH",
    "TR",
    "CA",
]
Maker = Callable[[random.Random], str]


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def email(rng: random.Random) -> str:
    name = rng.choice(["jane.doe", "info", "j_smith+list", "peter-pan", "x", "müller"]) + digits(
        rng, rng.choice([0, 3])
    )
    host = rng.choice(["example.com", "mail.example.co.uk", "uni-bonn.de", "abc.museum"])
    return f"{name}@{host}"


def card(rng: random.Random) -> str:
    from stdnum import luhn

    if rng.random() < 0.2:
        body = rng.choice(["34", "37"]) + digits(rng, 12)
        whole = body + luhn.calc_check_digit(body)
        return rng.choice([whole, f"{whole[:4]} {whole[4:10]} {whole[10:]}"])
    body = rng.choice(["4" + digits(rng, 1), "51", "55", "60", "62"])
    body = (body if body != "60" else "6011") + digits(rng, 15 - len(body if body != "60" else "6011"))
    whole = body + luhn.calc_check_digit(body)
    return rng.choice(["", " ", "-"]).join(whole[i : i + 4] for i in range(0, 16, 4))


def iban(rng: random.Random) -> str:
    """German, Dutch and Belgian ones; the last have a checksum of their own."""
    country = rng.choice(["DE", "NL", "BE"])
    if country == "DE":
        body = digits(rng, 18)
    elif country == "NL":
        while True:
            account = digits(rng, 10)
            if sum(int(d) * (10 - i) for i, d in enumerate(account)) % 11 == 0:
                break
        body = rng.choice(["INGB", "RABO", "ABNA"]) + account
    else:
        account = digits(rng, 10)
        body = account + f"{int(account) % 97 or 97:02d}"
    number = int("".join(str(int(c, 36)) for c in f"{body}{country}00"))
    whole = f"{country}{98 - number % 97:02d}{body}"
    return whole if rng.random() < 0.5 else " ".join(whole[i : i + 4] for i in range(0, len(whole), 4))


def us_ssn(rng: random.Random) -> str:
    area = rng.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"


def cn_id(rng: random.Random) -> str:
    from stdnum.cn import ric

    place = rng.choice(["110105", "310104", "440106", "510107", "330102"])
    body = f"{place}{rng.randint(1940, 2015)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{digits(rng, 3)}"
    return body + ric.calc_check_digit(body + "0")


def es_id(rng: random.Random) -> str:
    from stdnum.es import dni

    number = digits(rng, 8)
    if rng.random() < 0.3:
        first = rng.choice("XYZ")
        number = number[:7]
        return f"{first}{rng.choice(['', '-'])}{number}{dni.calc_check_digit(str('XYZ'.index(first)) + number)}"
    return f"{number}{rng.choice(['', '-'])}{dni.calc_check_digit(number)}"


def ip(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return ":".join(f"{rng.randrange(0x1000, 0x10000):x}" for _ in range(8))
    return ".".join(str(rng.randint(1 if i == 0 else 0, 254)) for i in range(4))


def phone(rng: random.Random) -> str:
    import phonenumbers as p

    while True:
        region = rng.choice(COUNTRIES)
        example = str(p.example_number(region).national_number)
        number = p.parse(example[:3] + digits(rng, len(example) - 3), region)
        if p.is_valid_number(number):
            break
    if region != "US" or rng.random() < 0.3:
        return p.format_number(number, rng.choice([p.PhoneNumberFormat.INTERNATIONAL, p.PhoneNumberFormat.E164]))
    area, first, last = example[:3], str(number.national_number)[3:6], str(number.national_number)[6:]
    styles = ("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "{} {} {}", "1-{}-{}-{}", "({}) {} {}")
    return rng.choice(styles).format(area, first, last)


KINDS: dict[str, Maker] = {
    "email": email,
    "phone": phone,
    "card": card,
    "iban": iban,
    "ip": ip,
    "us_ssn": us_ssn,
    "cn_id": cn_id,
    "es_id": es_id,
}


def isbn(rng: random.Random) -> str:
    body = rng.choice(["978", "979"]) + digits(rng, 9)
    check = -sum(int(d) * (1, 3)[i % 2] for i, d in enumerate(body)) % 10
    whole = f"{body}{check}"
    return rng.choice([whole, f"{whole[:3]}-{whole[3]}-{whole[4:7]}-{whole[7:12]}-{check}"])


def date(rng: random.Random) -> str:
    year, month, day = rng.randint(1900, 2030), rng.randint(1, 12), rng.randint(1, 28)
    styles = [f"{year}-{month:02d}-{day:02d}", f"{day:02d}.{month:02d}.{year}", f"{month}/{day}/{year}"]
    styles += [f"{year}{month:02d}{day:02d}", f"{year}-{month:02d}-{day:02d} 12:{day:02d}:45", f"{year}-{year + 3}"]
    return rng.choice(styles)


def version(rng: random.Random) -> str:
    numbers = [str(rng.randint(0, 20)) for _ in range(4)]
    return rng.choice(["v", "version ", "release ", "Version "]) + ".".join(numbers[: rng.choice([3, 4])])


def uuid(rng: random.Random) -> str:
    return "-".join("".join(rng.choices("0123456789abcdef", k=k)) for k in (8, 4, 4, 4, 12))


NONE: dict[str, Maker] = {
    "ISBN": isbn,
    "date, time, years": date,
    "version": version,
    "DOI": lambda rng: (
        f"10.{rng.randint(1000, 9999)}/s{digits(rng, 5)}-0{digits(rng, 2)}-{digits(rng, 4)}-{rng.randint(1, 9)}"
    ),
    "article number": lambda rng: rng.choice(["SKU ", "Art. ", "No. ", ""]) + digits(rng, rng.choice([8, 9, 10, 12])),
    "EAN-13": lambda rng: "40" + digits(rng, 11),
    "amount": lambda rng: f"${rng.randint(1, 999)},{digits(rng, 3)},{digits(rng, 3)}.{digits(rng, 2)}",
    "measured values": lambda rng: " ".join(f"{rng.randint(10, 999)}.{rng.randint(0, 99)}" for _ in range(5)),
    "coordinates": lambda rng: f"{rng.uniform(0, 90):.6f}, {rng.uniform(0, 180):.6f}",
    "ZIP+4, pages": lambda rng: rng.choice(
        [f"{digits(rng, 5)}-{digits(rng, 4)}", f"pp. {digits(rng, 4)}-{digits(rng, 4)}"]
    ),
    "PMID, trial, arXiv": lambda rng: rng.choice(
        [f"PMID: {digits(rng, 8)}", f"NCT0{digits(rng, 7)}", f"arXiv:{rng.randint(1000, 2999)}.{digits(rng, 5)}"]
    ),
    "UUID": uuid,
    "MAC address": lambda rng: ":".join(f"{rng.randrange(256):02X}" for _ in range(6)),
    "paragraph": lambda rng: (
        f"section {rng.randint(1, 9)}.{rng.randint(1, 20)}.{rng.randint(1, 20)}.{rng.randint(1, 9)}"
    ),
    "code": lambda rng: rng.choice(["std::vector<int>", "a::b", "x[3::2]", "@media", "user@host", "@name"]),
}


def outcome(rule, kind: str, make: Maker, count: int, rng: random.Random) -> float:
    """Share of the sentences in which the datum was masked, wholly; of what is none: in which anything was."""
    from fastft.corpus.rules.base import Document

    masked = 0
    for _ in range(count):
        said = make(rng)
        sentence = rng.choice(SENTENCES + SAID.get(kind, ()))
        document = Document(sentence.format(said))
        rule.apply(document)
        masked += (
            document.text == sentence.format(f"<{kind.upper()}>")
            if kind in KINDS
            else document.text != sentence.format(said)
        )
    return masked / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="*", default=[], help="for the rate: documents of twelve lines")
    parser.add_argument("--count", type=int, default=2000, help="of every kind")
    parser.add_argument("--machine", default=default_machine())
    args = parser.parse_args()
    from fastft import rooms
    from fastft.corpus.rules.base import Document

    kind = rooms.RULES.get("personal_data")
    rule, rng = kind(kind.Settings()), random.Random(0)
    right = {name: outcome(rule, name, make, args.count, rng) for name, make in KINDS.items()}
    wrong = {name: outcome(rule, name, make, args.count, rng) for name, make in NONE.items()}
    precision = sum(right.values()) / (sum(right.values()) + sum(wrong.values()))
    head, about = __doc__.partition("\n\n    python")[0], __doc__.partition("NAME]\n")[2]
    names = ("phonenumbers", "python-stdnum")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    pieces = [
        f"# personal data\n\n{head}\n{about}",
        f"{args.machine}; {time.strftime('%Y-%m-%d')}; {versions}; {args.count:,} of each.\n",
        table(["planted", "masked"], [[name, f"{share:.4f}"] for name, share in right.items()]),
        "",
        table(["none", "masked wrongly"], [[name, f"{share:.4f}"] for name, share in wrong.items()]),
        f"\nPrecision over both tables, equally many of each: {precision:.4f}.",
    ]
    if args.texts:
        text = "\n".join(gzip.decompress(Path(path).read_bytes()).decode() for path in args.texts)
        lines = [line for line in text.split("\n") if line]
        documents = ["\n".join(lines[i : i + 12]) for i in range(0, len(lines), 12)]
        size, seconds = sum(len(one.encode()) for one in documents) / 1e6, []
        for _ in range(3):
            start = time.perf_counter()
            for one in documents:
                rule.apply(Document(one))
            seconds.append(time.perf_counter() - start)
        pieces.append(
            f"\nOf {len(documents):,} documents of six corpora, {size:.0f} MB, in one process: "
            f"{len(documents) / min(seconds):,.0f} documents/s, {size / min(seconds):.0f} MB/s."
        )
    RESULTS.joinpath("personal_data.md").write_text("\n".join(pieces) + "\n")
    print("\n".join(pieces))


if __name__ == "__main__":
    sys.exit(main())
