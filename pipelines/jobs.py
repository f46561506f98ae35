"""Jobs: named selections of the graph that people start by one click."""

import dagster as dg

everything = dg.define_asset_job(
    "everything",
    selection="+key:report",
    description="From the sources to the report; what is up to date is not done again.",
)
corpus = dg.define_asset_job(
    "corpus", selection="+key:latent_corpus", description="Only the data: sources, corpus, tokenizer, latent corpus."
)
