"""Graph rewrites on Dynamo's FX graph: graph in, graph out."""
