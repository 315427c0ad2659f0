# Settings of one run, stage base: plain literals, read and never executed. None switches off.
# Precedence: built-in default, then this file, then --name=value on the command line.


# -------------------- run ---------------------------------------------------------------------------------------------

# name of the run for trackers; matters only with wandb_mode [run has no effect while wandb_mode='disabled']
run = "dummy"

# where to compute; None takes the best of this machine; one of cpu, cuda, mps
device_type = None

# dtype of activations; None takes bfloat16 where the hardware profits from it; one of float32, bfloat16
dtype = None

# seed of initialisation, data order and samples
seed = 42

# bit-equal runs on a GPU too, at the price of speed (a CPU's always are)
deterministic = False

# seconds that a rank waits for the others in a step before the run ends
rank_timeout = 600

# name of the checkpoint folder; None says depth and variant, as in d4-tied
model_tag = None

# Weights & Biases tracking; metrics.jsonl is always written; one of disabled, offline, online
wandb_mode = "disabled"

# compile the model with torch.compile; falls back to eager with a printed reason
compile = True

# multiply the blocks' large matrices in FP8 in training: GPUs from Hopper on
fp8 = False

# begin with the weights of the newest step of this model_tag or folder, ours or nanochat's own
init_from = None

# what nanochat's own files in init_from are from, as in 2026-03-02; None: what they look like; matters only with
# init_from [init_era has no effect while init_from=None]
init_era = None


# -------------------- data --------------------------------------------------------------------------------------------

# stdlib, packages, climbmix, synth (captioned melodies), hf:<dataset>, or the path of a file or folder
data = "stdlib"

# column that holds the text in jsonl, parquet and hub datasets
data_column = "text"

# split of the hub dataset to read
data_split = "train"

# configuration name of the hub dataset
data_config = None

# use at most so many climbmix shards or hub documents; None uses the source's default
data_limit = None

# leave out unreadable shards and files, naming them, instead of stopping
skip_corrupt = False

# name or folder of a trained tokenizer; None trains one on this data
tokenizer = None

# ids of the tokenizer, its 16 special and reserved ones included
vocab_size = 4096


# -------------------- model -------------------------------------------------------------------------------------------

# context length in tokens
max_seq_len = 512

# number of transformer layers: the one dial
depth = 4

# width per layer: model_dim = depth * aspect_ratio, rounded up to head_dim; matters only with model_dim=None
# [aspect_ratio has no effect while model_dim=192]
aspect_ratio = 64

# width of the residual stream; None takes depth * aspect_ratio
model_dim = 192

# width of one attention head (even)
head_dim = 64

# key/value heads (grouped-query attention); None means one for each query head
n_kv_head = None

# hidden units of an MLP for each of its width
mlp_ratio = 4.0

# tie embedding weights: the embedding also makes the logits
tie_weights = True

# add a square output projection before the tied logits; matters only with tie_weights=True
use_output_projection = False

# add the projection to its input instead of replacing it; matters only with use_output_projection=True
# [output_projection_residual has no effect while use_output_projection=False]
output_projection_residual = False

# base of the rotary frequencies; nanochat now uses 100000
rope_base = 100000.0

# factor of normalised queries and keys, the sharper the larger; nanochat now uses 1.2
qk_scale = 1.2

# logits are squashed smoothly into plus and minus this
softcap = 15.0

# what each layer sees, again and again: L all that came before, S a short window; the last layer is always L
window_pattern = "SSSL"

# tokens before a token that an S layer sees; None: a quarter of the context, rounded up to 128; matters only with
# window_pattern
short_window = 64

# no token sees what came before its document in the same row; on GPUs FlexAttention trains so
document_mask = False

# rows of the tables are rounded up to a multiple of it; 64 suits the kernels of GPUs
vocab_multiple = 1

# every other layer adds a gated embedding of the token to its values: memory, hardly any time
value_embeddings = True

# mix a gated part of the previous token's embedding into each token's
smear = True

# learn how much of the stream and of the first embedding goes into each block
residual_scalars = True

# take a learned part of the middle block's output off the last one's (from depth 3 on)
backout = True

# rows of a hashed table of embeddings of two neighbouring tokens, which every block adds; None has none
bigram_rows = None


# -------------------- modalities --------------------------------------------------------------------------------------

# modalities beside text and the codes in a codebook of each, as in audio:2048
modalities = None

# codebooks of audio; each is one more position a frame; matters only with modalities [codebooks has no effect while
# modalities=None]
codebooks = 1

# sound to codes: frame, pitch, mdct (fitted on the data); encodec:<hub name or folder>; a fitted one's name; matters
# only with modalities [codec has no effect while modalities=None]
codec = "frame"

# sounds are cut to so many seconds; None keeps them whole; matters only with modalities [clip_seconds has no effect
# while modalities=None]
clip_seconds = None

# column that holds the sound in hub datasets; matters only with modalities [data_audio_column has no effect while
# modalities=None]
data_audio_column = "audio"

# what each modality has of its own: nothing, the MLP, or attention's matrices too (random: a control); one of none,
# mlp, all, random; matters only with modalities [untie has no effect while modalities=None]
untie = "mlp"

# width inside the experts of the further modalities; None takes the model's; matters only with untie [expert_dim has
# no effect while modalities=None]
expert_dim = None

# logits: a layer for each modality; one shared, masked to the target's modality in the loss; or one shared; one of
# separate, masked, shared; matters only with modalities [output_layers has no effect while modalities=None]
output_layers = "separate"

# modalities whose targets count in the training loss: all, or names as in audio; matters only with modalities
# [loss_modalities has no effect while modalities=None]
loss_modalities = "all"

# source of text-only documents to mix with captioned sounds: as data, by its defaults, from column text; matters only
# with modalities [text_data has no effect while modalities=None]
text_data = None

# share of the positions that text-only documents take; matters only with text_data [text_share has no effect while
# text_data=None]
text_share = 0.5

# how tokens get to their experts: sorted; all by all (where); rows of one layout (slice); one kernel (grouped); one
# of sort, where, slice, grouped; matters only with untie [route has no effect while modalities=None]
route = "sort"


# -------------------- horizon -----------------------------------------------------------------------------------------

# optimizer steps; takes precedence over the other two horizons
num_iterations = 600

# rows a device works on at a time; lower it when memory runs out
device_batch_size = 8

# tokens per optimizer step over all devices; with batch_start in the end
total_batch_size = 4096

# tokens per step at first, doubled to total_batch_size: equal tokens at each size, rates by its root
batch_start = None

# train for so many FLOPs; takes precedence over the ratio; matters only with num_iterations=None [target_flops has no
# effect while num_iterations=600]
target_flops = None

# train for so many tokens per matmul parameter (Chinchilla: 20); matters only with target_flops=None
# [target_param_data_ratio has no effect while num_iterations=600]
target_param_data_ratio = None


# -------------------- optimizer ---------------------------------------------------------------------------------------

# largest gradient norm; None never clips
grad_clip = 1.0

# AdamW's decay rates of the two moments
adam_betas = (0.8, 0.95)

# steps of linear warmup
warmup_steps = 0

# last part of the run in which the rate falls linearly
warmdown_ratio = 0.4

# rate at the end as a fraction of the full one
final_lr_frac = 0.0

# AdamW rate of an untied embedding, before the (width/768)^-0.5 scaling; matters only with tie_weights=False
# [embedding_lr has no effect while tie_weights=True]
embedding_lr = 0.2

# AdamW rate of an untied lm_head, before the same scaling; matters only with tie_weights=False [unembedding_lr has no
# effect while tie_weights=True]
unembedding_lr = 0.004

# AdamW rate of the tied matrix, before the same scaling; matters only with tie_weights=True
tied_weights_lr = 0.005

# standard deviation of the tied matrix at the start; matters only with tie_weights=True
tied_init_std = 0.02

# part of the steps after which the tied tables are split, at the tied rate; None: never; matters only with
# tie_weights=True
untie_at = None

# AdamW rate of value embeddings, before the same scaling; matters only with value_embeddings=True
value_embedding_lr = 0.2

# AdamW rate of the table of bigrams, before the same scaling; matters only with bigram_rows [bigram_lr has no effect
# while bigram_rows=None]
bigram_lr = 0.2

# Muon rate of the weight matrices
matrix_lr = 0.02

# AdamW rate of the lambdas and gates of the newer features
scalar_lr = 0.01

# decoupled weight decay of the Muon matrices
weight_decay = 0.0

# decay only where update and weight point the same way; matters only with weight_decay [cautious_weight_decay has no
# effect while weight_decay=0.0]
cautious_weight_decay = True

# orthogonalisation of Muon's update; one of polar_express, newton_schulz
muon_method = "polar_express"

# dtype of the orthogonalisation; None follows dtype; one of float32, bfloat16
muon_dtype = None

# Nesterov momentum in Muon
muon_nesterov = True

# normalise Muon's update per neuron by a running variance (NorMuon)
muon_normalize = True


# -------------------- evaluation --------------------------------------------------------------------------------------

# steps between measurements of val bpb; None only at the end
eval_every = 200

# held-out tokens of each measurement; None takes all
eval_tokens = None

# steps between runs of CORE, or of the offline suite without the bundle
core_metric_every = None

# items per task of these runs; None takes all; matters only with core_metric_every [core_metric_max_per_task has no
# effect while core_metric_every=None]
core_metric_max_per_task = 500

# steps between printed samples; None only at the end
sample_every = None


# -------------------- checkpoints -------------------------------------------------------------------------------------

# steps between checkpoints; None only at the end
save_every = 300

# keep only the newest so many checkpoints; None keeps all; matters only with save_every
keep_last = None

# start over although the model_tag holds a run (the old one is moved aside)
overwrite = False

# train although another process seems to be training this model_tag
ignore_lock = False

# log the documents of every row to rows_rank<k>.jsonl
log_rows = False
