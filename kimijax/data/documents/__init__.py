"""Documents as they lie in foreign files: text, JSONL and Parquet, in units that workers share."""
