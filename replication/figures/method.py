"""The figure of the method. `make figures` writes it as method.svg.

One UNet, four uses of it, one a strip. Sizes are for a phone: at 360 px wide the smallest letter is 10 px high.
"""

from __future__ import annotations

import dataclasses

from replication.figures.style import WIDTH, Canvas, Palette

STRIP, GAP, TOP = 262, 26, 8


@dataclasses.dataclass(frozen=True)
class Strip:
  """One use of the UNet.

  Attributes:
    title: what it is.
    image: what enters the image stream, in two lines.
    caption: what cross-attention reads.
    query: what enters the text stream; None where there is none, and the UNet is Stable Diffusion's.
    out: what comes out, in two lines.
    loop: what is fed back, in words; empty for nothing.
  """

  title: str
  image: tuple[str, str]
  caption: str
  query: tuple[str, str] | None
  out: tuple[str, str]
  loop: str = ""


STRIPS = (
  Strip(
    "Training: generation pass",
    ("z + noise ε_z", "= z_t at step t_z"),
    "caption c",
    None,
    ("ε̂_z", "loss L_IG"),
  ),
  Strip(
    "Training: discrimination pass",
    ("clean z", "at step 1000"),
    "empty caption",
    ("γe + noise ε_e", "= e_t at step t_e"),
    ("ê_0", "loss L_ITA"),
  ),
  Strip(
    "Generation",
    ("pure noise z_T", ""),
    "prompt c",
    None,
    ("z_0", "→ image"),
    "DDIM steps",
  ),
  Strip(
    "Classification",
    ("clean z of", "the image"),
    "empty caption",
    ("pure noise e_T", ""),
    ("ê_0 · e", "per name"),
  ),
)


def draw(canvas: Canvas, strip: Strip, top: float) -> None:
  """Draw a strip, with its upper edge at `top`."""
  p = canvas.palette
  discriminates = strip.query is not None
  middle = top + 118  # of the image stream
  canvas.text(4, top + 24, strip.title, size=26, anchor="start")
  canvas.text(300, top + 58, strip.caption, size=21, colour=p.soft)
  canvas.arrow(f"M300,{top + 66} L300,{middle - 40}", p.soft)

  # The UNet: down path, middle, up path, which discrimination does not run.
  canvas.polygon(
    [(216, middle - 52), (356, middle - 24), (356, middle + 24), (216, middle + 52)], stroke=p.image, fill=p.image_fill
  )
  canvas.box(362, middle - 24, 56, 48, stroke=p.image, fill=p.image_fill)
  way_up = [(424, middle - 24), (564, middle - 52), (564, middle + 52), (424, middle + 24)]
  stroke, fill = (p.off, p.ground) if discriminates else (p.image, p.image_fill)
  canvas.polygon(way_up, stroke=stroke, fill=fill, dashed=discriminates)
  canvas.text(282, middle + 8, "down", size=21, colour=p.image)
  canvas.text(390, middle + 8, "mid", size=21, colour=p.image)
  up, colour = ("not run", p.soft) if discriminates else ("up", p.image)
  canvas.text(498, middle + 8, up, size=21, colour=colour)
  for i, line in enumerate(strip.image):
    canvas.text(96, middle - 2 + 26 * i if strip.image[1] else middle + 8, line, colour=p.image)
  canvas.arrow(f"M188,{middle} L210,{middle}", p.image)

  below = middle + 94  # the text stream
  if strip.query is None:
    canvas.arrow(f"M568,{middle} L594,{middle}", p.image)
    for i, line in enumerate(strip.out):
      canvas.text(656, middle - 2 + 27 * i, line, colour=p.image)
    if strip.loop:
      canvas.arrow(f"M656,{middle + 42} C640,{middle + 112} 130,{middle + 112} 104,{middle + 24}", p.soft)
      canvas.text(376, middle + 76, strip.loop, size=21, colour=p.soft)
    return
  for i, line in enumerate(strip.query):
    canvas.text(96, below - 2 + 26 * i if strip.query[1] else below + 8, line, colour=p.text)
  canvas.arrow(f"M188,{below} L420,{below}", p.text)
  # Deep fusion: at each attention block of down path and middle the text token attends with the image tokens.
  for x, height in ((246, 46), (292, 36), (338, 28), (390, 24)):
    canvas.dot(x, below, p.text)
    canvas.arrow(f"M{x},{below - 8} L{x},{middle + height + 6}", p.text)
  canvas.text(306, below + 34, "deep fusion", size=21, colour=p.text)
  # The alignment transformer reads the text token and the middle feature map.
  canvas.box(428, below - 34, 140, 68, stroke=p.text, fill=p.text_fill)
  canvas.text(498, below - 6, "alignment", size=21, colour=p.text)
  canvas.text(498, below + 20, "transformer", size=21, colour=p.text)
  canvas.arrow(f"M406,{middle + 26} C420,{middle + 46} 470,{middle + 40} 470,{below - 38}", p.image)
  canvas.arrow(f"M572,{below} L594,{below}", p.text)
  for i, line in enumerate(strip.out):
    canvas.text(652, below - 2 + 27 * i, line, colour=p.text)


def picture(palette: Palette) -> str:
  """Return the figure as SVG."""
  canvas = Canvas(palette)
  canvas.text(582, TOP + 24, "image stream", size=21, colour=palette.image, anchor="end")
  canvas.text(716, TOP + 24, "text stream", size=21, colour=palette.text, anchor="end")
  heights = [STRIP if strip.query else STRIP - 42 if strip.loop else STRIP - 84 for strip in STRIPS]
  top = TOP
  for i, (strip, height) in enumerate(zip(STRIPS, heights, strict=True)):
    if i:
      canvas.parts.append(
        f'<line x1="0" x2="{WIDTH}" y1="{top - GAP / 2}" y2="{top - GAP / 2}" stroke="{palette.off}" stroke-width="1"/>'
      )
    draw(canvas, strip, top)
    top += height + GAP
  title = (
    "DiffDis: one UNet. It generates images by removing noise from an image latent z, and classifies images by removing"
    " noise from a text query e under the condition of the clean image."
  )
  return canvas.svg(int(top), title)
