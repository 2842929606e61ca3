module diffusion-operator.io/testkit/tools/pause

go 1.26.0
