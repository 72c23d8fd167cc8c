"""Which modules a paper means, for the naming of common architectures."""

# The first linear map of the MLP in each block: GPT-2 and OpenCLIP, CLIP and OPT, BERT and ViT,
# Llama and its like, T5, DistilBERT, GPT-NeoX and Falcon, torch.nn.TransformerEncoderLayer.
FIRST_OF_MLP = (
    r"(.*\.)?(c_fc|fc1|intermediate\.dense|up_proj|gate_proj|"
    r"wi|wi_0|wi_1|lin1|dense_h_to_4h|linear1)"
)
# The last one, in the same order.
LAST_OF_MLP = r"(.*\.)?(mlp\.c_proj|fc2|\d+\.output\.dense|down_proj|wo|lin2|dense_4h_to_h|linear2)"
ATTENTION_INPUTS = (
    r"(.*\.)?(q_proj|k_proj|v_proj|qkv_proj|query|key|value|query_key_value|c_attn|qkv|"
    r"q_lin|k_lin|v_lin|SelfAttention\.[qkv]|EncDecAttention\.[qkv])"
)
GATES_OF_MLP = r"(.*\.)?(gate_proj|w1)"
LAYER_SCALES = r"(.*\.)?(gamma|lambda_?[12]?|layer_scale_parameter)"
VISUAL_PROJECTION = r"(.*\.)?(visual\.proj|visual_projection)"
CLASS_TOKEN = r"(.*\.)?cls_token"
POSITIONS_AND_PATCHES = r"(.*\.)?(pos_embed|position_embeddings|patch_embed|patch_embeddings)"
# Parameters in a numbered list, and outside of any. Named as parameters, since a module that holds
# such a list would stand for what is in it.
IN_LAYERS = r"(.*\.)?\d+\..*(weight|bias)"
OUTSIDE_LAYERS = r"(?!(.*\.)?\d+\.)(.*\.)?(weight|bias)"
EVERYTHING = r"(.*\.)?(weight|bias)"
# Numbered from 0, as module lists are.
LAYERS_9_TO_14 = r"(.*\.)?(layers?|h|blocks?)\.(9|1[0-4])"
# Of the residual blocks of a ResNet, without the stem; and all else.
FIRST_CONVS = r".+\.conv1\.weight"
BUT_FIRST_CONVS = r"(?!.+\.conv1\.weight)(.*\.)?(weight|bias)"
# Of a PEFT model.
LORA_FACTORS = r"(.*\.)?lora_(embedding_)?[AB]\..*"
LORA_A = r"(.*\.)?lora_(embedding_)?A\..*"
LORA_B = r"(.*\.)?lora_(embedding_)?B\..*"
LORA_BASES = r"(.*\.)?base_layer"

WORDS = {
    "all-linear": "linear weights",
    "all": "all parameters",
    FIRST_OF_MLP: "first linear layers of MLPs",
    LAST_OF_MLP: "last linear layers of MLPs",
    ATTENTION_INPUTS: "queries, keys and values",
    GATES_OF_MLP: "gate projections of MLPs",
    LAYER_SCALES: "layer scales",
    VISUAL_PROJECTION: "visual projection",
    CLASS_TOKEN: "class token",
    POSITIONS_AND_PATCHES: "position and patch embeddings",
    IN_LAYERS: "everything in layers",
    OUTSIDE_LAYERS: "everything outside of layers",
    EVERYTHING: "everything",
    LAYERS_9_TO_14: "layers 9 to 14",
    FIRST_CONVS: "first convolutions of blocks",
    BUT_FIRST_CONVS: "everything else",
    LORA_FACTORS: "factors of LoRAs",
    LORA_A: "factors A of LoRAs",
    LORA_B: "factors B of LoRAs",
    LORA_BASES: "weights that have a LoRA",
}
