"""The page: the tabs that a run can serve, laid out in Gradio. What a tab answers is in the file of its name."""

from __future__ import annotations

import dataclasses
import functools
import html
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from absl import logging
from gradio import processing_utils, themes

from diffdis_jax.app import charts, classify, draw, inside, search
from diffdis_jax.app.limits import Limits
from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.errors import UserError

TITLES = {"draw": "Generate"}  # of tabs whose title is not their name in the page's API
PICKS = 12  # images of the folder that can be picked
KEPT = 3600  # seconds for which an upload stays on disk, at most
SWEPT = 60  # seconds between two looks for those that are that old
# No font from elsewhere: the page asks this machine alone.
FONT = ["system-ui", "sans-serif"]
MONOSPACE = ["ui-monospace", "monospace"]
CSS = (
  charts.CSS
  + """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.head h1 { margin-bottom: 2px; } .head p { color: var(--body-text-color-subdued); }
.picks .grid-wrap { overflow: visible !important; max-height: none !important; min-height: 0 !important; }
.picks .grid-wrap { height: auto !important; padding: 8px; }
.picks .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; gap: 8px; }
.picks .grid-container { grid-template-rows: none !important; }
.picks, .picks > * { min-height: 0 !important; height: auto !important; }
.picks .thumbnail-lg, .picks .thumbnail-item { min-width: 0; width: 100%; height: auto; aspect-ratio: 1; }
.upload img { object-fit: contain; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
  """What the page begins with.

  Attributes:
    title: of the run.
    about: a line about it.
    prompt: of the field at first.
    names: class names, as they stand in their field.
    template: of the names.
    steps, guidance: of generation.
  """

  title: str
  about: str
  prompt: str
  names: str
  template: str
  steps: int
  guidance: float


def build(sampler: StepSampler, index: search.Index | None, limits: Limits, contents: Contents) -> gr.Blocks:
  """The page; `queue` and `launch` are the caller's."""
  page = gr.Blocks(title=f"DiffDis: {contents.title}", analytics_enabled=False, delete_cache=(SWEPT, KEPT - SWEPT))
  with page:
    # Escaped: a folder's name may hold what Markdown takes for HTML.
    gr.Markdown(f"# DiffDis\n{html.escape(contents.about)}", elem_classes="head")
    picks = _picks(index)
    with gr.Tabs():
      for name in sampler.tabs:
        # The run can search, but it names no images and --data neither.
        if name == "search" and index is None:
          continue
        with gr.Tab(TITLES.get(name, name.capitalize()), id=name, render_children=True):
          if name == "draw":
            _draw_tab(sampler, limits, contents)
          elif name == "classify":
            _classify_tab(sampler, limits, contents, picks)
          elif name == "search" and index is not None:
            _search_tab(sampler, index, limits, picks)
          elif name == "inside":
            _inside_tab(sampler, limits, contents, picks)
  return page.queue(max_size=limits.waiting, default_concurrency_limit=limits.at_once)


def theme() -> themes.Base:
  return themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONOSPACE)


def said(answer: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
  """The answer, whose UserError the page shows as a message."""

  @functools.wraps(answer)
  def shown(*inputs: Any) -> Iterator[str]:
    try:
      yield from answer(*inputs)
    except UserError as error:
      # Gradio shows a message as HTML, and it may repeat what was typed. Bad input needs no traceback in the log.
      raise gr.Error(html.escape(str(error)), title="This cannot be done", print_exception=False) from error

  return shown


def _answer(name: str) -> gr.HTML:
  return gr.HTML(elem_classes="answer", elem_id=f"{name}-answer")


def _ask(
  button: gr.Button, answer: Callable[..., Iterator[str]], inputs: Sequence[Any], output: gr.HTML, *, name: str
) -> None:
  """The button, and the return key in a field of one line, ask."""
  # In a field of several lines the return key begins a new line.
  fields = [field.submit for field in inputs if isinstance(field, gr.Textbox) and field.lines == 1]
  gr.on(
    [button.click, *fields],
    said(answer),
    inputs,
    output,
    api_name=name,
    show_progress="minimal",
    # A second click, while the first is answered, would ask again.
    trigger_mode="once",
    # Without a common name the limit of requests at a time would be each button's, and not that of all together.
    concurrency_id="model",
  )


def _picks(index: search.Index | None) -> list[Any]:
  """Images of the folder, at even distances, those that can be read."""
  if index is None:
    return []
  found = []
  for place in range(0, len(index.indices), max(1, len(index.indices) // PICKS))[:PICKS]:
    try:
      found.append(index.record(place).image)
    except UserError as error:
      logging.warning("an image to pick is left out: %s", error)
  return found


def _unchecked(field: Any) -> Any:
  """A slider or number that hands on whatever is sent: the answers check it, and say what would be right."""
  field.preprocess = lambda value: value
  return field


def _slider(label: str, least: float, most: float, value: float, *, step: float = 1) -> Any:
  return _unchecked(gr.Slider(least, most, value, step=step, label=label))


def _no_address() -> gr.Error:
  return gr.Error("an image is uploaded as a file, not as an address", print_exception=False)


async def _fetch_nothing(url: str, cache_dir: str) -> str:
  """In the place of Gradio's own, which fetches what a request names as a file, in any field and of any size, before a
  field is asked: anybody could reach what only this machine can (SSRF), and fill it."""
  del url, cache_dir
  raise _no_address()


processing_utils.async_ssrf_protected_download = _fetch_nothing


def _unopened(upload: Any) -> str | None:
  """The path of an uploaded file, which nobody has opened yet."""
  if upload is not None and upload.path is None:
    raise _no_address()
  return None if upload is None else upload.path


def _image_field(picks: Sequence[Any], *, name: str) -> gr.Image:
  """An upload with images to pick below it."""
  small = "small" if picks and picks[0].shape[0] < charts.PIXELATED else ""
  field: Any = gr.Image(
    sources=["upload", "clipboard"],
    type="filepath",
    format="png",
    label="Image",
    height=240,
    elem_id=f"{name}-image",
    elem_classes=["upload", small],
    buttons=[],
  )
  # Gradio would open the file before `limits.read_image` has checked it.
  field.preprocess = _unopened
  if picks:
    gallery = gr.Gallery(
      list(picks),
      label="or pick one",
      show_label=False,
      columns=6,
      height="auto",
      format="png",
      allow_preview=False,
      interactive=False,
      object_fit="cover",
      buttons=[],
      elem_id=f"{name}-picks",
      elem_classes=["picks", small],
    )

    def pick(event: gr.SelectData) -> Any:
      return picks[int(event.index)]

    gallery.select(pick, None, field, api_visibility="private", show_progress="hidden")
  return field


def _seed() -> Any:
  return _unchecked(gr.Number(0, label="Seed", precision=0, minimum=0, maximum=draw.MOST_SEED))


def _text(value: str, label: str, limits: Limits, *, lines: int = 1, texts: int = 1, info: str = "") -> gr.Textbox:
  # A browser keeps to `max_length`; programs do not, so that the answers check it too.
  return gr.Textbox(
    value, label=label, lines=lines, max_lines=max(lines, 1), max_length=limits.characters * texts, info=info or None
  )


def _draw_tab(sampler: StepSampler, limits: Limits, contents: Contents) -> None:
  prompt = _text(contents.prompt, "Prompt", limits)
  with gr.Row():
    steps = _slider("Steps", 1, draw.MOST_STEPS, min(contents.steps, draw.MOST_STEPS))
    scale = _slider("Guidance", 0, draw.MOST_GUIDANCE, min(contents.guidance, draw.MOST_GUIDANCE), step=0.5)
    seed = _seed()
  button = gr.Button("Generate", variant="primary", elem_id="draw-button")
  _ask(
    button, functools.partial(draw.answer, sampler, limits), [prompt, seed, steps, scale], _answer("draw"), name="draw"
  )


def _classify_tab(sampler: StepSampler, limits: Limits, contents: Contents, picks: Sequence[Any]) -> None:
  with gr.Row():
    with gr.Column(scale=2, min_width=300):
      image = _image_field(picks, name="classify")
    with gr.Column(scale=3, min_width=300):
      names, template = _names_fields(limits, contents)
      with gr.Row(visible=not sampler.network.is_clip):
        draws = _slider("Noise samples", 1, classify.MOST_DRAWS, 8)
        seed = _seed()
      button = gr.Button("Classify", variant="primary", elem_id="classify-button")
      inputs = [image, names, template, draws, seed]
      _ask(button, functools.partial(classify.answer, sampler, limits), inputs, _answer("classify"), name="classify")


class _NamesFields(NamedTuple):
  names: gr.Textbox
  template: gr.Textbox


def _names_fields(limits: Limits, contents: Contents) -> _NamesFields:
  names = _text(contents.names, "Class names", limits, lines=3, texts=limits.names, info="with commas between them")
  return _NamesFields(names, _text(contents.template, "Template", limits, info="{} is the name"))


def _search_tab(sampler: StepSampler, index: search.Index, limits: Limits, picks: Sequence[Any]) -> None:
  with gr.Row():
    with gr.Column(scale=2, min_width=300):
      text = _text("", "By text", limits)
      by_text = gr.Button("Search by text", variant="primary", elem_id="search-text-button")
      image = _image_field(picks, name="search")
      by_image = gr.Button("Search by image", elem_id="search-image-button")
    with gr.Column(scale=3, min_width=300):
      output = _answer("search")
  _ask(by_text, functools.partial(search.by_text, sampler, index, limits), [text], output, name="search_text")
  _ask(by_image, functools.partial(search.by_image, sampler, index, limits), [image], output, name="search_image")


def _inside_tab(sampler: StepSampler, limits: Limits, contents: Contents, picks: Sequence[Any]) -> None:
  with gr.Row():
    with gr.Column(scale=2, min_width=300):
      image = _image_field(picks, name="inside")
    with gr.Column(scale=3, min_width=300):
      names, template = _names_fields(limits, contents)
      with gr.Row():
        steps = _slider("Steps", 1, inside.MOST_STEPS, 10)
        draws = _slider("Noise samples", 1, inside.MOST_DRAWS, 8)
        seed = _seed()
      button = gr.Button("Look inside", variant="primary", elem_id="inside-button")
  inputs = [image, names, template, steps, draws, seed]
  _ask(button, functools.partial(inside.answer, sampler, limits), inputs, _answer("inside"), name="inside")
