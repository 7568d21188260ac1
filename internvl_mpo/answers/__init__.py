"""When is an answer right: find the final answer of a response, compare it with the ground truth.

finding       where the final answer stands: marker, box, after the thinking, or the whole text
comparing     the verdict, and which rules each source of questions is judged by: begin here
choices       which option an answer names; yes or no
numbers       numbers with units, alone or in a sentence, and when two are the same
number_words  numbers in words, English and Chinese, as digits
dates         dates in the usual spellings
texts         short texts, lists of them, ANLS
formulas      formulas, compared by the values that algebra calculates for them
spelling      words in American spelling, in the singular
wording       a second look at answers that say the same in other words
"""

from internvl_mpo.answers.choices import parse_options
from internvl_mpo.answers.common import clean_answer
from internvl_mpo.answers.comparing import Outcome, Verdict, compare_answers, judge_response, rules_of_source
from internvl_mpo.answers.dates import parse_date
from internvl_mpo.answers.finding import FORMATS, parse_answer
from internvl_mpo.answers.numbers import parse_number
from internvl_mpo.answers.texts import anls

__all__ = [
    "FORMATS",
    "Outcome",
    "Verdict",
    "anls",
    "clean_answer",
    "compare_answers",
    "judge_response",
    "parse_answer",
    "parse_date",
    "parse_number",
    "parse_options",
    "rules_of_source",
]
