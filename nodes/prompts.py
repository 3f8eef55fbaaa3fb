"""SVDQuant Prompts: the sentences that calibration samples."""

from comfy_api.latest import io

DEFAULT_PROMPTS = """\
a lighthouse on a basalt cliff at dusk, long exposure sea, 35mm photograph
portrait of an elderly fisherman with a salt-white beard, window light, shallow focus
a bowl of ramen with a soft egg and spring onions, steam, top view food photography
two red pandas asleep on a mossy branch in the rain
isometric cutaway of a tiny bookshop, warm lamps, clay render
an astronaut tending tomatoes in a greenhouse on Mars, retro science fiction paperback cover
a hand-painted sign that reads "FRESH BREAD" above a bakery door
macro photograph of a dew-covered dragonfly, black background
a crowded night market in Taipei, neon reflections on wet asphalt
watercolour of a mountain village in early spring, loose brushwork
a blueprint of a mechanical owl, white lines on blue paper
a ballet dancer in mid-leap on an empty stage, motion blur, high contrast black and white
an origami fox on a wooden desk beside a cup of coffee
aerial view of a braided river delta at sunrise, turquoise and ochre
a cyberpunk courier on a hoverbike racing through a tunnel, anime key frame
a still life with lemons, pewter jug and a half-peeled orange, Dutch golden age oil painting
close-up of weathered hands shaping a clay pot on a wheel
a cosy reading nook in a tree house while snow falls outside
three children flying a dragon-shaped kite on a windy beach
a minimalist logo of a hummingbird, flat green and gold on white
a knight in dented armour drinking tea with a dragon, storybook illustration
a street cat wearing a tiny yellow raincoat, film grain
fashion editorial of a woman in a sculptural red coat against brutalist concrete
an old library with a spiral staircase and dust in the light beams, wide angle
pixel art of a floating island with a waterfall and a windmill
a steam locomotive crossing a stone viaduct in autumn fog
a glass chess set on a marble table, caustics, studio lighting
an infographic poster about the phases of the moon, labelled diagrams
underwater photograph of a sea turtle above a coral reef, sun rays
a desert caravan beneath the Milky Way, long shadows from a campfire
a jazz trio in a smoky basement club, drawn with charcoal
a vegetable stall at a farmers' market, crates of aubergines, handwritten price tags
a futuristic city park with people, robots and dogs at noon, clean concept art
a close-up of an eye with a galaxy reflected in the iris
a snow leopard stepping over a ridge, telephoto, overcast light
a simple pencil sketch of a bicycle leaning on a fence
"""


def split_prompts(text: str) -> list[str]:
    """One prompt per line; empty lines and lines that start with # do not count."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


class SVDQuantPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SVDQuantPrompts",
            display_name="SVDQuant Prompts",
            category="SVDQuant",
            description="Encodes one prompt per line into the list of conditionings that SVDQuant Quantize samples.",
            search_aliases=["calibration prompts", "quantize prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders that belong to the model you quantize."),
                io.String.Input(
                    "prompts",
                    default=DEFAULT_PROMPTS,
                    multiline=True,
                    tooltip="One prompt per line; lines that start with # are left out. Varied prompts, like those you "
                    "will use, calibrate best: subjects, styles, lettering, people, plain and busy scenes.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="conditioning list",
                    is_output_list=True,
                    tooltip="One conditioning per prompt, for SVDQuant Quantize.",
                )
            ],
        )

    @classmethod
    def execute(cls, clip, prompts: str) -> io.NodeOutput:
        return io.NodeOutput(encode(clip, prompts))


def encode(clip, prompts: str) -> list:
    """A conditioning per prompt."""
    lines = split_prompts(prompts)
    if not lines:
        raise ValueError("SVDQuant Prompts: the text holds no prompt. Write at least one line.")
    return [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines]
