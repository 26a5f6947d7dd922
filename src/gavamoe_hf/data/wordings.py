"""
The vocabulary of the synthetic data: a music shop's aspects and kinds of item, and one wording for each
group.

No template, kind or adjective contains the name of an aspect, so that a text names an aspect only where the
generator put it; and no two groups share a marker word, so that a text's group can be told.
"""

import re
from dataclasses import dataclass

ASPECTS = (
    "price",
    "comfort",
    "tone",
    "durability",
    "design",
    "weight",
    "setup",
    "packaging",
    "warranty",
    "finish",
    "size",
    "grip",
    "stability",
    "clarity",
    "colour",
    "portability",
)

KINDS = (
    "guitar strap",
    "drum stool",
    "microphone stand",
    "keyboard case",
    "violin bow",
    "bass amp",
    "pedal board",
    "patch cable",
    "chromatic tuner",
    "soprano ukulele",
    "steel capo",
    "pocket metronome",
)


@dataclass(frozen=True)
class Wording:
    """
    How one group of users writes.

    Attributes:
        markers (`tuple[str, ...]`): Words that this group alone uses; every template has at least one.
        positive (`tuple[str, ...]`): Templates with `{kind}`, `{feature}` and `{adjective}` for a rating of 3
            or more.
        negative (`tuple[str, ...]`): Templates for ratings below 3.
        praise (`tuple[str, ...]`): Adjectives for the positive templates; they are markers too.
        blame (`tuple[str, ...]`): Adjectives for the negative templates; they are markers too.
    """

    markers: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]


WORDINGS = (
    Wording(
        markers=("stage", "gig", "crowd", "encore", "setlist"),
        positive=(
            "On stage last night the {feature} of this {kind} was {adjective} and the crowd roared.",
            "Every gig goes better now that the {feature} of the {kind} is {adjective}.",
            "I left the stage smiling, as the {feature} of this {kind} stayed {adjective} until the encore.",
            "Put this {kind} on your setlist, because its {feature} is {adjective} at any gig.",
        ),
        negative=(
            "Halfway through the gig the {feature} of this {kind} felt {adjective} and the crowd noticed.",
            "On stage the {kind} let me down, because its {feature} is {adjective}.",
            "The encore was ruined by this {kind}, whose {feature} turned {adjective}.",
            "I cut the {kind} from my setlist after one gig, as the {feature} was {adjective}.",
        ),
        praise=("electrifying", "thunderous", "roadworthy"),
        blame=("lifeless", "shaky", "embarrassing"),
    ),
    Wording(
        markers=("studio", "session", "engineer", "overdub", "mixdown"),
        positive=(
            "Our engineer swears by this {kind}, for in the studio its {feature} is {adjective}.",
            "After a long session I can report that the {feature} of the {kind} remains {adjective}.",
            "The {kind} survived each overdub, and its {feature} came out {adjective} in the mixdown.",
            "For careful studio work the {feature} of this {kind} is simply {adjective}.",
        ),
        negative=(
            "The engineer stopped our session, because the {feature} of this {kind} was {adjective}.",
            "In the studio the {feature} of the {kind} proved {adjective}, so every overdub was wasted.",
            "I would keep this {kind} far from a mixdown, its {feature} is {adjective}.",
            "One session was enough to hear that the {feature} of the {kind} is {adjective}.",
        ),
        praise=("pristine", "transparent", "immaculate"),
        blame=("muddy", "brittle", "blurred"),
    ),
    Wording(
        markers=("lesson", "teacher", "practice", "beginner", "homework"),
        positive=(
            "My teacher recommended this {kind}, and for a beginner its {feature} is {adjective}.",
            "Daily practice is fun with the {kind}, whose {feature} is so {adjective}.",
            "In our first lesson the {feature} of this {kind} already felt {adjective}.",
            "Even homework feels short, because the {feature} of the {kind} is {adjective}.",
        ),
        negative=(
            "My teacher sent this {kind} back, since its {feature} is {adjective} for a beginner.",
            "Practice became a chore, because the {feature} of the {kind} is {adjective}.",
            "We lost a whole lesson to this {kind}, as its {feature} is {adjective}.",
            "No beginner should do homework with the {kind}, its {feature} is {adjective}.",
        ),
        praise=("friendly", "forgiving", "motivating"),
        blame=("confusing", "tiring", "frustrating"),
    ),
    Wording(
        markers=("collector", "vintage", "heirloom", "workshop", "craftsmanship"),
        positive=(
            "As a collector I admire this {kind}, for its {feature} is {adjective}.",
            "True craftsmanship shows in the {kind}, and the {feature} is {adjective}.",
            "It hangs beside my vintage pieces, since the {feature} of this {kind} is {adjective}.",
            "The {kind} will become an heirloom, because its {feature} is {adjective}.",
        ),
        negative=(
            "No collector would keep this {kind}, whose {feature} is {adjective}.",
            "It left my workshop the same day, because the {feature} of the {kind} is {adjective}.",
            "Next to vintage pieces the {feature} of this {kind} looks {adjective}.",
            "I miss real craftsmanship in the {kind}, its {feature} is {adjective}.",
        ),
        praise=("exquisite", "timeless", "masterly"),
        blame=("tacky", "soulless", "shoddy"),
    ),
    Wording(
        markers=("busking", "sidewalk", "suitcase", "hostel", "hitchhiking"),
        positive=(
            "Busking all summer taught me that the {feature} of this {kind} is {adjective}.",
            "The {kind} fits my suitcase, and its {feature} is {adjective}.",
            "On any sidewalk the {feature} of the {kind} is {adjective}.",
            "Everyone in the hostel envied this {kind}, since its {feature} is {adjective}.",
        ),
        negative=(
            "While busking I found the {feature} of this {kind} {adjective}.",
            "I threw the {kind} out of my suitcase, because its {feature} is {adjective}.",
            "I left this {kind} on the sidewalk, as the {feature} was {adjective}.",
            "Hitchhiking with the {kind} is no joy, its {feature} is {adjective}.",
        ),
        praise=("breezy", "carefree", "unbeatable"),
        blame=("clumsy", "annoying", "hopeless"),
    ),
)


def find_wording(text: str, num_groups: int = len(WORDINGS)) -> int | None:
    """
    Tell which group's wording a text uses, by its marker words.

    Args:
        text (`str`): Any text, such as a generated explanation.
        num_groups (`int`, defaults to 5): How many groups the data has.

    Returns:
        `int` or `None`: The group with the most marker words; `None` where no group has one, where two are
        equal, or where the wording belongs to none of the data's groups.
    """
    words = re.findall(r"[a-z]+", text.lower())
    counts = [
        sum(word in (*wording.markers, *wording.praise, *wording.blame) for word in words) for wording in WORDINGS
    ]
    best = max(counts)
    if best == 0 or counts.count(best) > 1 or counts.index(best) >= num_groups:
        return None
    return counts.index(best)
