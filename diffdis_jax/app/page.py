"""Lay out the page: the tabs that a run can serve, in Gradio. answers.py has what they answer."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when it is imported

import gradio as gr
from gradio import themes
from gradio_client import utils as client_utils

from diffdis_jax.app import answers
from diffdis_jax.app.answers import MOST_CHARACTERS, MOST_NAMES
from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts

TITLES = {"draw": "Generate"}  # of tabs whose title differs from their name in the page's API
KEPT, SWEPT = 540, 60  # seconds that uploads and answers' images stay on disk, and between two clean-ups
SMALL = 128  # pixels: smaller images are enlarged without smoothing
WAITING = 64  # waiting requests; further ones are refused
Answer = Callable[..., Iterator[Any]]
HOW: dict[str, Any] = dict(
  # The answers check their input, and say what would be right.
  preprocess=False,
  show_progress="minimal",
  # A second click before the answer would send the request again.
  trigger_mode="once",
  # With a common name, the limit on concurrent requests is for all buttons together, not for each.
  concurrency_id="model",
)
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.small img { image-rendering: pixelated; }
.upload img { object-fit: contain; }
.grid-wrap { max-height: none !important; }
.thumbnail-item { max-height: 420px; margin: 0 auto; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  .tab { flex-direction: column-reverse; }  /* the result before the form */
}
"""


class Page(gr.Blocks):
  """Blocks that fetch nothing: Gradio would download any address that a request names as a file, whatever its size."""

  async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **how: Any) -> Any:
    client_utils.traverse(inputs, _refuse_address, client_utils.is_file_obj_with_meta)
    return await super().preprocess_data(block_fn, inputs, *args, **how)


def _refuse_address(file: dict[str, Any]) -> dict[str, Any]:
  if client_utils.is_http_url_like(file["path"]):
    raise gr.Error("an image is uploaded as a file, not as an address", print_exception=False)
  return file


def theme() -> themes.Base:
  """Return Gradio's theme without fonts from the web, so that the page contacts this machine alone."""
  return themes.Soft(primary_hue="indigo", neutral_hue="slate", font=["system-ui"], font_mono=["ui-monospace"])


def build(sampler: StepSampler, index: answers.Index | None, run: Run, about: str) -> gr.Blocks:
  """Lay out the page of a run. `about` names it and its checkpoint.

  The model answers the first example here, so that its programs are compiled before the page is served.
  """
  page = Page(title=f"DiffDis: {about}", analytics_enabled=False, delete_cache=(SWEPT, KEPT))
  tabs = _Tabs(sampler, index, run)
  with page:
    # Escape it: a folder's name may contain what Markdown reads as HTML.
    gr.Markdown(f"# DiffDis\n{html.escape(about)}")
    with gr.Tabs() as all_tabs:
      tabs.all = all_tabs
      for name in sampler.tabs:
        if name != "search" or index is not None:
          with gr.Tab(TITLES.get(name, name.capitalize()), id=name, render_children=True):
            getattr(tabs, name)()
  # One request at a time: the model is on one device.
  return page.queue(max_size=WAITING, default_concurrency_limit=1)


class _Tabs:
  """The tabs; each method builds the tab of its name. Generation is first, since its example is also Classify's."""

  def __init__(self, sampler: StepSampler, index: answers.Index | None, run: Run):
    self._sampler, self._index, self._run = sampler, index, run
    self._zero_shot = next((section for section in run.evals.values() if section["task"] == "zero_shot"), {})
    self._small = "small" if sampler.network.image_size < SMALL else ""
    self._send, self._example = None, None
    self._drawing: tuple[list[Any], list[Any]] = [], []
    self.all: Any = None

  def draw(self) -> None:
    how, text = self._run.inference, [*self._run.sample_prompts, "a red star"][0]
    with gr.Row(elem_classes=["tab"]):
      with gr.Column(scale=2, min_width=300):
        prompt = gr.Textbox(text, label="Prompt", max_length=MOST_CHARACTERS)
        button = gr.Button("Generate", variant="primary", elem_id="draw-button")
        images = gr.Slider(1, answers.MOST_IMAGES, 1, step=1, label="Images")
        steps = gr.Slider(1, answers.MOST_STEPS, min(how.generation_steps, answers.MOST_STEPS), step=1, label="Steps")
        most = answers.MOST_GUIDANCE
        scale = gr.Slider(0, most, min(how.generation_guidance, most), step=0.5, label="Guidance")
        seed = self._seed()
        new_seed = gr.Button("New seed", elem_id="seed-button")
      with gr.Column(scale=3, min_width=300):
        line, drawn = last(answers.generate(self._sampler, text, 1, 0, steps.value, scale.value))
        outputs = [self._line("draw", line), self._gallery("", 2, drawn)]
        if "classify" in self._sampler.tabs:
          self._send = gr.Button("Classify the first image", elem_id="send-button")
          self._example = drawn and drawn[0][0]
    random = f"() => Math.floor(Math.random() * {answers.MOST_SEED})"
    new_seed.click(None, None, seed, js=random, api_visibility="private")
    self._drawing = [prompt, images, seed, steps, scale], outputs
    self._ask(button, answers.generate, *self._drawing, self._sampler, name="draw")

  def classify(self) -> None:
    if self._example is None and self._index is not None:
      self._example = self._index.read(0)[0]
    with gr.Row(elem_classes=["tab"]):
      with gr.Column(scale=2, min_width=300):
        image = self._image("classify", self._example)
        names, template, seed = self._names(), self._template(), self._seed()
        button = gr.Button("Classify", variant="primary", elem_id="classify-button")
      with gr.Column(scale=3, min_width=300):
        line, shares = "", None
        if self._example is not None:
          line, shares = last(answers.classify(self._sampler, self._example, names.value, template.value, 0))
        label = gr.Label(shares, label="Shares", num_top_classes=6, elem_id="classify-answer")
        outputs = [self._line("classify", line), label]
        back: Any = self._send and gr.Button("Generate the likeliest", elem_id="back-button")
    inputs = [image, names, template, seed]
    self._ask(button, answers.classify, inputs, outputs, self._sampler, name="classify")
    if self._send is not None:
      drawing, (_, gallery) = self._drawing
      take = lambda images: iter([(images[0]["image"]["path"] if images else None, gr.Tabs(selected="classify"))])
      example = self._ask(self._send, take, [gallery], [image, self.all], name="take")
      example.success(_shown(answers.classify, self._sampler), inputs, outputs, **HOW, api_visibility="private")
      draw = lambda answer, text: iter([(answers.likeliest(answer, text), gr.Tabs(selected="draw"))])
      prompt = gr.on(back.click, _shown(draw), [label, template], [drawing[0], self.all], api_name="likeliest", **HOW)
      prompt.success(_shown(answers.generate, self._sampler), *self._drawing, **HOW, api_visibility="private")

  def search(self) -> None:
    with gr.Row(elem_classes=["tab"]):
      with gr.Column(scale=2, min_width=300):
        text = gr.Textbox(label="By text", max_length=MOST_CHARACTERS)
        by_text = gr.Button("Search by text", variant="primary", elem_id="search-text-button")
        image = self._image("search", None)
        by_image = gr.Button("Search by image", elem_id="search-image-button")
      with gr.Column(scale=3, min_width=300):
        outputs = [self._line("search", ""), self._gallery("Nearest first", 4, None)]
    given = self._sampler, self._index
    self._ask(by_text, answers.search_text, [text], outputs, *given, name="search_text")
    self._ask(by_image, answers.search_image, [image], outputs, *given, name="search_image")

  def _ask(
    self, button: gr.Button, answer: Answer, inputs: list[Any], outputs: list[Any], *given: Any, name: str
  ) -> Any:
    """Let the button, and the return key in a one-line field, call `answer(*given, *inputs)`."""
    fields = [field.submit for field in inputs if isinstance(field, gr.Textbox) and field.lines == 1]
    return gr.on([button.click, *fields], _shown(answer, *given), inputs, outputs, api_name=name, **HOW)

  def _line(self, name: str, text: str) -> gr.Textbox:
    return gr.Textbox(text, show_label=False, interactive=False, container=False, elem_id=f"{name}-line")

  def _gallery(self, label: str, columns: int, images: Any) -> gr.Gallery:
    how: Any = dict(interactive=False, height="auto", object_fit="contain", elem_classes=[self._small])
    return gr.Gallery(images, label=label, columns=columns, format="png", **how)

  def _image(self, name: str, value: Any) -> gr.Image:
    style: Any = dict(elem_classes=["upload", self._small], buttons=[], elem_id=f"{name}-image", height=240)
    return gr.Image(value, sources=["upload", "clipboard"], type="filepath", format="png", label="Image", **style)

  def _names(self) -> gr.Textbox:
    """Add the field of class names, which begins with those of the run's evaluation if it lists them."""
    listed, text = self._zero_shot.get("classnames"), "cat, dog, horse"
    # A string would be the path of a file, which may be on another machine.
    if isinstance(listed, list | tuple) and len(listed) <= MOST_NAMES and not any("," in name for name in listed):
      text = ", ".join(listed)
    info, limit = "with commas between them", MOST_CHARACTERS * MOST_NAMES
    return gr.Textbox(text, label="Class names", lines=3, max_lines=3, max_length=limit, info=info)

  def _template(self) -> gr.Textbox:
    templates = self._zero_shot.get("templates", ())
    # Use the plain prompt if the first of many templates is another one.
    single = self._zero_shot.get("single_template") or (not isinstance(templates, str) and templates and templates[0])
    text = single or prompts.TEMPLATES[0]
    return gr.Textbox(text, label="Template", info="{} is the name", max_length=MOST_CHARACTERS)

  def _seed(self) -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=answers.MOST_SEED)


def last(answer: Iterator[tuple[str, Any]]) -> tuple[str, Any]:
  """Return the last line and values of an answer; for a UserError, such as a diverged model's, its text is the line."""
  line, values = "", None
  try:
    for shown in answer:
      line, values = shown
  except UserError as error:
    line = str(error)
  return line, values


def _shown(answer: Answer, *given: Any) -> Answer:
  """Wrap an answer, so that the page shows its UserErrors as messages."""

  def call(*inputs: Any) -> Iterator[Any]:
    try:
      # Gradio describes an uploaded file by a dict.
      yield from answer(*given, *(value.get("path", value) if isinstance(value, dict) else value for value in inputs))
    except UserError as error:
      # Gradio shows a message as HTML, and it may repeat what the user typed. Bad input needs no traceback in the log.
      raise gr.Error(html.escape(str(error)), title="This cannot be done", print_exception=False) from error

  return call
