"""The card of a prepared data set: what is in it, where it is from, what was dropped, and what to mind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import DatasetDict, concatenate_datasets
from huggingface_hub import DatasetCard, DatasetCardData

from ..data.splits import SPLITS
from ..model_card import CARD_FILE, _table, _text

__all__ = ["CARD_FILE", "dataset_card"]

_FEATURES_SHOWN = 10
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGEST = "n>1M"

_BODY = """# Explainable-recommendation records from reviews

Each record is one user's rating of one item, with a sentence of the user's own review that explains it, and a feature
that this sentence speaks of. Made with `gavamoe prepare`, gavamoe-hf {version}.

```python
from datasets import {function}

records = {function}("{name}")
```

{sizes}

| column | what it holds |
|---|---|
| `user`, `item` | the ids of the source |
| `rating` | the user's rating of the item, one of {levels} |
| `explanation` | a sentence of the review, {min_words} to {max_words} words |
| `feature` | what the sentence speaks of, as the sentence writes it, in lower case |
| `opinion` | what it says of the feature |
{timestamp}
Split 8:1:1 at random; every user and item of validation and test occurs in train. {num_users} users, {num_items} items,
{num_features} features; the commonest: {features}.

{ratings}

## Where it is from

{files}

**To fill in by whoever publishes this: who collected the reviews and when, under which terms, and what to cite.**
{license}

## How it was made

{lines} lines were read, of which {num_bad} held no review. {times}Of the {num_reviews} reviews:

{drops}

Sentences of the reviews whose sentences were looked at:

{sentences}

Options: {options}.

A sentence is chosen for a feature that many reviews name, for sounding as its rating does and for speaking of the item
rather than of the writer. Sentence, feature and opinion were found by rules and a parser and not checked by hand: some
are wrong, and some sentences say little about the rating.

## Privacy

Sentences with what looks like an email address, a phone number or a link were left out. Names of people were not looked
for. User ids are those of the source: together with items and dates they can point to a person, above all where the
source uses public names. Replace them before publishing where its terms or the law ask for it.
"""


def dataset_card(splits: DatasetDict, summary: Mapping[str, Any], hub_id: str | None = None) -> DatasetCard:
    """
    The card. Names from the data are escaped.

    Args:
        splits ([`~datasets.DatasetDict`]): The data set.
        summary (`Mapping[str, Any]`): What `prepare.json` holds.
        hub_id (`str`, *optional*): Its id on the Hub; by default the card is of a local folder.

    Returns:
        [`~huggingface_hub.DatasetCard`]: with the Hub's metadata.
    """
    options = summary["options"]
    everything = concatenate_datasets([splits[split] for split in SPLITS])
    is_known = options["language"] != "none"
    data = DatasetCardData(
        language=[options["language"]] if is_known else None,
        license=options["license"] or "unknown",
        task_categories=["text-generation"],
        tags=["recommendation", "explainable-recommendation", "reviews", "gavamoe"],
        size_categories=[next((size for limit, size in _SIZES if len(everything) < limit), _LARGEST)],
        pretty_name="Explainable-recommendation records from reviews",
    )
    has_time = "timestamp" in everything.column_names
    dropped = {reason: count for reason, count in summary["dropped"].items() if count}
    # Not in those of earlier versions
    bad_times = summary.get("bad_times", 0)
    num_reviews = summary["lines"] - summary["bad_lines"]["count"]
    body = _BODY.format(
        version=summary["version"],
        name=hub_id or ".",
        function="load_dataset" if hub_id else "load_from_disk",
        sizes=_table(["split", "records"], [[split, f"{len(splits[split]):,}"] for split in SPLITS]),
        levels=", ".join(f"{level:g}" for level in sorted(options["rating_levels"])),
        min_words=options["min_words"],
        max_words=options["max_words"],
        timestamp="| `timestamp` | when the review was written, seconds of Unix time |\n" if has_time else "",
        num_users=f"{summary['users']:,}",
        num_items=f"{summary['items']:,}",
        num_features=f"{summary['features']:,}",
        features=_commonest(everything["feature"][:]),
        ratings=_ratings(everything["rating"][:]),
        files=_table(["file", "bytes"], [[_text(file["name"]), f"{file['bytes']:,}"] for file in summary["files"]]),
        license="" if options["license"] else "The license is not known: name it in the metadata above.",
        lines=f"{summary['lines']:,}",
        num_bad=f"{summary['bad_lines']['count']:,}",
        times=f"{bad_times:,} reviews have a time that could not be read. " if bad_times else "",
        num_reviews=f"{num_reviews:,}",
        drops=_table(
            ["reviews", "count", "share"],
            [
                [_text(reason), f"{count:,}", f"{count / num_reviews:.1%}"]
                for reason, count in (*dropped.items(), ("made a record", len(everything)))
            ],
        ),
        sentences=_table(
            ["sentences", "count"], [[_text(fate), f"{count:,}"] for fate, count in summary["sentences"].items()]
        ),
        options=", ".join(f"`{name}` {_text(value)}" for name, value in options.items() if value is not None),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _commonest(features: list[str]) -> str:
    counts = Counter(features).most_common(_FEATURES_SHOWN)
    return ", ".join(f"{_text(feature)} ({count:,})" for feature, count in counts)


def _ratings(ratings: list[float]) -> str:
    counts = sorted(Counter(ratings).items())
    return _table(["rating", "records"], [[f"{rating:g}", f"{count:,}"] for rating, count in counts])
