"""The page: the tabs that a run can serve, laid out in Gradio. What they answer is in answers.py."""

from __future__ import annotations

import dataclasses
import functools
import html
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from absl import logging
from gradio import themes
from gradio_client import utils as client_utils

from diffdis_jax.app import answers, search
from diffdis_jax.app.limits import Limits
from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.errors import UserError

TITLES = {"draw": "Generate"}  # of tabs whose title is not their name in the page's API
PICKS = 12  # images of the folder that can be picked
KEPT = 600  # seconds for which an upload and an answer's images stay on disk, at most
SWEPT = 60  # seconds between two looks for those that are that old
SMALL = 128  # pixels: images of smaller sides are enlarged without smoothing
# No font from elsewhere: the page asks this machine alone.
FONT = ["system-ui", "sans-serif"]
MONOSPACE = ["ui-monospace", "monospace"]
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.small img { image-rendering: pixelated; }
.upload img { object-fit: contain; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
  """The values that the page begins with.

  Attributes:
    about: the run and its checkpoint.
    prompt: of the field at first.
    names: class names, as they stand in their field.
    template: of the names.
    steps, guidance: of generation.
  """

  about: str
  prompt: str
  names: str
  template: str
  steps: int
  guidance: float


class Page(gr.Blocks):
  """Blocks that fetch nothing: Gradio would download what a request names as a file, of any size, into the machine."""

  async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **how: Any) -> Any:
    client_utils.traverse(inputs, _refuse_address, client_utils.is_file_obj_with_meta)
    return await super().preprocess_data(block_fn, inputs, *args, **how)


def _refuse_address(file: dict[str, Any]) -> dict[str, Any]:
  if client_utils.is_http_url_like(file["path"]):
    raise gr.Error("an image is uploaded as a file, not as an address", print_exception=False)
  return file


def build(sampler: StepSampler, index: search.Index | None, limits: Limits, contents: Contents) -> gr.Blocks:
  """Lay out the page; serving it is the caller's."""
  page = Page(title=f"DiffDis: {contents.about}", analytics_enabled=False, delete_cache=(SWEPT, KEPT - SWEPT))
  tabs = _Tabs(sampler, index, limits, contents)
  with page:
    # Escaped: a folder's name may hold what Markdown takes for HTML.
    gr.Markdown(f"# DiffDis\n{html.escape(contents.about)}")
    with gr.Tabs():
      for name in sampler.tabs:
        # The run can search, but it names no images and --data neither.
        if name != "search" or index is not None:
          with gr.Tab(TITLES.get(name, name.capitalize()), id=name, render_children=True):
            getattr(tabs, name)()
  # One at a time: the model is on one device.
  return page.queue(max_size=limits.waiting, default_concurrency_limit=1)


def theme() -> themes.Base:
  return themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONOSPACE)


def shown(answer: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
  """Wrap an answer, so that the page shows its UserError as a message."""

  @functools.wraps(answer)
  def call(*inputs: Any) -> Iterator[Any]:
    try:
      # An upload comes as Gradio describes files.
      for values in answer(*(each["path"] if isinstance(each, dict) else each for each in inputs)):
        yield tuple(values)
    except UserError as error:
      # Gradio shows a message as HTML, and it may repeat what was typed. Bad input needs no traceback in the log.
      raise gr.Error(html.escape(str(error)), title="This cannot be done", print_exception=False) from error

  return call


class _Tabs:
  """The tabs, each a method of its name."""

  def __init__(self, sampler: StepSampler, index: search.Index | None, limits: Limits, contents: Contents):
    self._sampler, self._index, self._limits, self._contents = sampler, index, limits, contents
    self._picks = picks(index)
    self._small = "small" if sampler.network.image_size < SMALL else ""

  def draw(self) -> None:
    contents = self._contents
    prompt = self._text(contents.prompt, "Prompt")
    with gr.Row():
      steps = gr.Slider(1, answers.MOST_STEPS, min(contents.steps, answers.MOST_STEPS), step=1, label="Steps")
      most = answers.MOST_GUIDANCE
      scale = gr.Slider(0, most, min(contents.guidance, most), step=0.5, label="Guidance")
      seed = self._seed()
    button = gr.Button("Generate", variant="primary", elem_id="draw-button")
    outputs = [self._line("draw"), self._gallery("", 3), self._gallery("emptied above, guided below, by t", 10)]
    self._ask(button, answers.generate, [prompt, seed, steps, scale], outputs, name="draw")

  def classify(self) -> None:
    with gr.Row():
      with gr.Column(scale=2, min_width=300):
        image = self._image("classify")
      with gr.Column(scale=3, min_width=300):
        names, template = self._names()
        with gr.Row(visible=not self._sampler.network.is_clip):
          samples = gr.Slider(1, answers.MOST_SAMPLES, 8, step=1, label="Noise samples")
          seed = self._seed()
        button = gr.Button("Classify", variant="primary", elem_id="classify-button")
        outputs = [self._line("classify"), gr.Label(label="Shares", num_top_classes=12, elem_id="classify-answer")]
    self._ask(button, answers.classify, [image, names, template, samples, seed], outputs, name="classify")

  def search(self) -> None:
    with gr.Row():
      with gr.Column(scale=2, min_width=300):
        text = self._text("", "By text")
        by_text = gr.Button("Search by text", variant="primary", elem_id="search-text-button")
        image = self._image("search")
        by_image = gr.Button("Search by image", elem_id="search-image-button")
      with gr.Column(scale=3, min_width=300):
        outputs = [self._line("search"), self._gallery("Nearest first", 4)]
    self._ask(by_text, answers.search_text, [text], outputs, self._index, name="search_text")
    self._ask(by_image, answers.search_image, [image], outputs, self._index, name="search_image")

  def inside(self) -> None:
    with gr.Row():
      with gr.Column(scale=2, min_width=300):
        image = self._image("inside")
      with gr.Column(scale=3, min_width=300):
        names, template = self._names()
        with gr.Row():
          steps = gr.Slider(1, answers.MOST_INSIDE_STEPS, 10, step=1, label="Steps")
          samples = gr.Slider(1, answers.MOST_INSIDE_SAMPLES, 8, step=1, label="Noise samples")
          seed = self._seed()
        button = gr.Button("Look inside", variant="primary", elem_id="inside-button")
    outputs: list[Any] = [self._line("inside")]
    with gr.Row():
      outputs.append(gr.LinePlot(x="step", y="score", color="name", title="Score of each name", height=300))
      title = "Estimates and names, on the two directions of most difference"
      outputs.append(gr.ScatterPlot(x="x", y="y", color="of", title=title, height=300))
    self._ask(button, answers.inside, [image, names, template, steps, samples, seed], outputs, name="inside")

  def _ask(
    self,
    button: gr.Button,
    answer: Callable[..., Iterator[Any]],
    inputs: list[Any],
    outputs: list[Any],
    *first: Any,
    name: str,
  ) -> None:
    """Let the button, and the return key in a field of one line, ask."""
    # In a field of several lines the return key begins a new line.
    fields = [field.submit for field in inputs if isinstance(field, gr.Textbox) and field.lines == 1]
    gr.on(
      [button.click, *fields],
      shown(functools.partial(answer, self._sampler, *first, self._limits)),
      inputs,
      outputs,
      api_name=name,
      # The answers check what is sent, and say what would be right.
      preprocess=False,
      show_progress="minimal",
      # A second click, while the first is answered, would ask again.
      trigger_mode="once",
      # Without a common name the limit of requests at a time would be each button's, and not that of all together.
      concurrency_id="model",
    )

  def _line(self, name: str) -> gr.Textbox:
    return gr.Textbox(show_label=False, interactive=False, container=False, elem_id=f"{name}-line")

  def _gallery(self, label: str, columns: int) -> gr.Gallery:
    return gr.Gallery(
      label=label, columns=columns, format="png", interactive=False, height="auto", elem_classes=[self._small]
    )

  def _image(self, name: str) -> gr.Image:
    """Add an upload, with images to pick below it."""
    style: Any = dict(elem_classes=["upload", self._small], buttons=[], elem_id=f"{name}-image", height=240)
    field = gr.Image(sources=["upload", "clipboard"], type="filepath", format="png", label="Image", **style)
    if self._picks:
      gallery = gr.Gallery(
        self._picks,
        label="or pick one",
        columns=6,
        format="png",
        allow_preview=False,
        interactive=False,
        elem_id=f"{name}-picks",
        elem_classes=[self._small],
      )

      def pick(event: gr.SelectData) -> Any:
        return self._picks[int(event.index)]

      gallery.select(pick, None, field, api_visibility="private", show_progress="hidden")
    return field

  def _names(self) -> _Names:
    info = "with commas between them"
    names = self._text(self._contents.names, "Class names", lines=3, texts=self._limits.names, info=info)
    return _Names(names, self._text(self._contents.template, "Template", info="{} is the name"))

  def _text(self, value: str, label: str, *, lines: int = 1, texts: int = 1, info: str | None = None) -> gr.Textbox:
    # A browser keeps to `max_length`; programs do not, so that the answers check it too.
    most = self._limits.characters * texts
    return gr.Textbox(value, label=label, lines=lines, max_lines=lines, max_length=most, info=info)

  def _seed(self) -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=answers.MOST_SEED)


class _Names(NamedTuple):
  names: gr.Textbox
  template: gr.Textbox


def picks(index: search.Index | None) -> list[Any]:
  """Read images of the folder, at even distances, those that can be read."""
  found = []
  count = 0 if index is None else len(index.indices)
  for place in range(0, count, max(1, count // PICKS))[:PICKS]:
    try:
      found.append(index.record(place).image)  # pyright: ignore[reportOptionalMemberAccess]
    except UserError as error:
      logging.warning("an image to pick is left out: %s", error)
  return found
