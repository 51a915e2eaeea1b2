// Runs the AOTInductor package of a bundle from C++: no Python, no diffdeploy.
//
//   g++ -std=c++20 -O1 run_aoti.cpp -o run_aoti -I TORCH/include -I TORCH/include/torch/csrc/api/include
//       -L TORCH/lib -Wl,-rpath,TORCH/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
//   run_aoti BUNDLE/model.pt2 BATCH LENGTH WIDTH [DTYPE [DEVICE]] < hidden_states > output
//
// TORCH is what `python -c "import torch; print(torch.__path__[0])"` prints. The numbers are raw and row-major.
// DTYPE is float32 (the default), float16 or bfloat16; DEVICE is what the bundle was made for, cpu or cuda.
// The program must be linked to libtorch, although it calls nothing in it: packages built with CUDA's torch need it.

#include <cstdlib>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int argc, char** argv) {
  const std::string dtype = argc > 5 ? argv[5] : "float32", device = argc > 6 ? argv[6] : "cpu";
  const std::map<std::string, at::ScalarType> dtypes = {
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
  if (argc < 5 || argc > 7 || !dtypes.contains(dtype)) {
    std::cerr << "usage: run_aoti MODEL.pt2 BATCH LENGTH WIDTH [float32|float16|bfloat16 [cpu|cuda]]"
                 " < hidden_states > output\n";
    return 2;
  }
  const std::vector<int64_t> shape = {std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4])};
  at::Tensor hidden_states = at::empty(shape, dtypes.at(dtype));
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
  const at::Tensor output = package.run({hidden_states.to(device)})[0].to(at::kCPU).contiguous();
  std::cout.write(static_cast<const char*>(output.data_ptr()), output.nbytes());
  return std::cout.flush() ? 0 : 1;
}
