"""Jobs: named selections of the graph that people start by one click, and that schedules and sensors ask for."""

import dagster as dg

everything = dg.define_asset_job(
    "everything",
    selection="+key:report or +key:promotion",
    description="From the sources to the report and the gate; what is up to date is not done again.",
)
corpus = dg.define_asset_job(
    "corpus", selection="+key:latent_corpus", description="Only the data: sources, corpus, tokenizer, latent corpus."
)
ablation = dg.define_asset_job(
    "ablation",
    selection="key:stage2_ablation",
    description="Cells of the paper's tables, a run each: choose one, several, or all as a backfill.",
)
