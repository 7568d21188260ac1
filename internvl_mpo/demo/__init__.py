"""The demo's rooms: base and MPO answer the same question side by side.

settings      every flag of app.py
pictures      uploads in, checked pictures and a drawing of their tiles out
conversation  turns of both sides, the final answer and whether the two agree
backends      who answers: two checkpoints, one base with a LoRA adapter, OpenAI-compatible servers
votes         preference rows for the next training round
sharing       conversations stored on request, behind a link
browser       questions of two evaluation runs on which the models differ
examples      pictures the repository may ship, drawn here
guard         what no request may ask the server for
serving       what Gradio's server holds for each caller, and where it listens
page, runs_tab, widgets   the page itself: what its buttons do, its second tab, its parts; the only files with Gradio
"""
