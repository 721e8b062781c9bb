"""The decoder: what one rank computes of MLA and GQA models, dense or mixture-of-experts."""
