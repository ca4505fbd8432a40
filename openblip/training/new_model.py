"""The sizes of a model that starts from nothing, as a recipe gives them."""

from openblip.config import Recipe
from openblip.models.blip import BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer


class ModelRecipe(Recipe):
    """Sizes of a new model; the defaults are the paper's base size at 224 px."""

    image_size_px: int = 224
    patch_size_px: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    drop_path: float = 0.0
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    ffn_width: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    embedding_width: int = 256
    init_std: float = 0.02
    position_init_std: float = 0.02

    def build_config(self, tokenizer: Tokenizer) -> BlipConfig:
        """Return the configuration of this size over a tokenizer's vocabulary."""
        return BlipConfig(
            vision=VisionConfig(
                image_size_px=self.image_size_px,
                patch_size_px=self.patch_size_px,
                width=self.vision_width,
                num_layers=self.vision_layers,
                num_heads=self.vision_heads,
                drop_path=self.drop_path,
                init_std=self.init_std,
                position_init_std=self.position_init_std,
            ),
            text=MedConfig(
                vocab_size=tokenizer.vocab_size,
                width=self.text_width,
                num_layers=self.text_layers,
                num_heads=self.text_heads,
                ffn_width=self.ffn_width,
                max_positions=self.max_positions,
                context_width=self.vision_width,
                dropout=self.dropout,
                init_std=self.init_std,
            ),
            tokens=tokenizer.special,
            embedding_width=self.embedding_width,
        )
