import sys; sys.path.insert(0,"/work/main/tests/training")
import test_cuda as c
from dataclasses import replace
cuda_base=c.cuda_base
def test_z(config_in,tiny_config,cuda_base,tmp_path,quiet):
    from tinyagent_fast.training import fit
    s=c.settings_of("transformers","fp32","length-grouped")
    s["train"]["threads"]=1
    cfg=tiny_config(**s); cfg=replace(cfg,model=replace(cfg.model,base=str(cuda_base)))
    run=fit.train(cfg,quiet)
    print([(r["step"],r["loss"]) for r in run.history() if r["event"]!="x"])
    import json
    for f in ("before","after"):
        print([json.loads(l)["prediction"][:60] for l in (run.path/"test"/f/"predictions.jsonl").read_text().splitlines()])
