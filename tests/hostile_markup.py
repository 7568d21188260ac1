"""Answers that try to leave their pane: what markup can do, in every wrapping that a Markdown dialect may misread."""

import random

FOREIGN = "https://elsewhere.example/spy.png"
PAYLOADS = (
    f'<img src="{FOREIGN}">',
    '<img src=x onerror="window.hacked=1">',
    f'<img srcset="{FOREIGN} 2x">',
    f"![spy]({FOREIGN})",
    f"![spy][ref]\n\n[ref]: {FOREIGN}",
    '<div style="position:fixed;inset:0;background:red">covered</div>',
    f'<form action="{FOREIGN}"><input name="q"><button>Go</button></form>',
    "<script>window.hacked=1</script>",
    f'<iframe src="{FOREIGN}"></iframe>',
    f'<video poster="{FOREIGN}" src="{FOREIGN}"></video>',
    f'<svg><image href="{FOREIGN}"/></svg>',
    f'<link rel="stylesheet" href="{FOREIGN}">',
    f"<style>body {{ background: url({FOREIGN}) }}</style>",
    f'<object data="{FOREIGN}"></object>',
    f'<body background="{FOREIGN}">',
    '<a href="javascript:window.hacked=1">x</a> [y](javascript:window.hacked=1)',
    f'<math><mtext><img src="{FOREIGN}"></mtext></math>',
    '<base href="https://elsewhere.example/">',
    "[hacked]: javascript:window.hacked=1\n\n[hacked]",
)
WRAPPINGS = (
    "{}",
    "`{}",
    "`` ` {}",
    "``{}` ``` {}",
    r"\`{}\`",
    r"\\`{}`",
    "`a\n\n{}`",
    "```mermaid\ngraph TD; A[{}]-->B\n```",
    "```html\n{}\n```\n{}",
    "~~~\n{}\n```\n{}\n~~~\n{}",
    "  ```\n{}\n```\n{}\n```",
    "- ```\n  {}\n```\n{}\n```\n{}",
    "> ```\n{}\n> ```\n{}",
    "```\n   ```\n{}\n```",
    "~~~ `x`\n{}\n~~~\n{}",
    "```\r{}\r```\r{}",
    "```\u2028{}\u2028```\u2028{}",
    "$5 {} $6",
    "$$\n```\n{}\n```\n$$",
    r"\[ {} \]",
    "    {}\n\n{}",
    "| a |\n|---|\n| {} |",
    "<think>{}</think>\n\nFinal answer: {}",
    "Final answer: {}",
    "**{}** <!-- {} -->",
    "1. ~~~\n{}\n~~~",
    "[{}](https://example.org)",
    "<details><summary>{}</summary></details>",
    "&lt;{} &#60;img src=x>",
    "<{}",
)


def hostile_answers(count: int, seed: int = 0) -> list[str]:
    """Return texts; every payload and every wrapping occurs where `count` allows."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        wrapping = WRAPPINGS[number % len(WRAPPINGS)]
        made.append(wrapping.format(*(draw.choice(PAYLOADS) for _ in range(wrapping.count("{}")))))
    return made
