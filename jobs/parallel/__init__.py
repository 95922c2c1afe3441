"""The workers as one of them sees them: shards, sums, the report of a step."""
