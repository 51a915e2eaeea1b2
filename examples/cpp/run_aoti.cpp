// Runs the AOTInductor package of a bundle from C++: no Python, no diffdeploy.
//
//   g++ -std=c++20 -O1 run_aoti.cpp -o run_aoti -I TORCH/include -I TORCH/include/torch/csrc/api/include
//       -L TORCH/lib -Wl,-rpath,TORCH/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
//   run_aoti BUNDLE/model.pt2 BATCH LENGTH WIDTH < hidden_states.f32 > output.f32
//
// TORCH is what `python -c "import torch; print(torch.__path__[0])"` prints. The numbers are raw float32, row-major.
// The program must hold on to libtorch, though it calls nothing of it: packages built with CUDA's torch ask for it.

#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run_aoti MODEL.pt2 BATCH LENGTH WIDTH < hidden_states.f32 > output.f32\n";
    return 2;
  }
  const std::vector<int64_t> shape = {std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4])};
  at::Tensor hidden_states = at::empty(shape, at::kFloat);
  if (!std::cin.read(static_cast<char*>(hidden_states.data_ptr()), hidden_states.nbytes())) {
    std::cerr << "standard input holds fewer than " << hidden_states.nbytes() << " bytes\n";
    return 2;
  }

  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  for (const auto& [key, value] : package.get_metadata()) {
    if (key == "weights_sha256") {
      std::cerr << "weights " << value << "\n";
    }
  }
  const at::Tensor output = package.run({hidden_states})[0].contiguous();
  std::cout.write(static_cast<const char*>(output.data_ptr()), output.nbytes());
  return std::cout.flush() ? 0 : 1;
}
