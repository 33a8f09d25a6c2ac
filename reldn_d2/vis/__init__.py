"""Pictures of relations, scene graphs, galleries, videos and saliency maps."""
