"""Everything that the numbered scripts import, in rooms; see docs/architecture.md."""
