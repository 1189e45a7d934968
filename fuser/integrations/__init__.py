"""fuser inside other people's pipelines."""
