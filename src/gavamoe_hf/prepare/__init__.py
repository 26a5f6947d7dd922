"""Raw reviews to records: read, filter, choose the sentence that explains, extract its feature, split, document."""
